"""A 2D image autoencoder's weights into a temporal one that treats each frame alike (Movie Gen s3.1.1).

    2D convolution [O, I, 3, 3]   2.5D: the convolution over space; that over time after it stays the identity
                                  3D: the middle tap of [O, I, k, 3, 3], zeros beside it
    attention over pixels         as it is; attention over frames adds zero
    everything else               as it is

Read from a run of ours, or from a folder of diffusers' `AutoencoderKL` (config.json and weights).
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from nemo_moviegen.tae.layers import Norm
from nemo_moviegen.tae.model import TemporalAutoencoder, centre_tap

DIFFUSERS_CONFIG = "config.json"
_DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
)
_DIFFUSERS_NEEDED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "mid_block_add_attention": True,
}
_DIFFUSERS_DEFAULTS = _DIFFUSERS_NEEDED | {
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
"""What a config.json that does not say it means."""
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of the attention's layers today and in folders that diffusers saved up to 2023."""


@torch.no_grad()
def load_weights(autoencoder: TemporalAutoencoder, weights: dict[str, Tensor], source: str) -> list[str]:
    """Fill `autoencoder` with `weights` of the same size or of the 2D one; names of what stays fresh.

    Only layers over time may stay fresh, and then all of them: weights are of a 2D autoencoder or whole.
    ValueError naming `source` where anything else is missing, left over or of another shape; then nothing
    is changed.
    """
    own = autoencoder.state_dict()
    fresh = [name for name in own if name not in weights]
    is_2d = not any(_is_over_time(name, weight) for name, weight in weights.items())
    found = [
        f"{name} is {tuple(weight.shape)}, here {tuple(own[name].shape)}"
        for name, weight in weights.items()
        if name in own and not _fits(weight.shape, own[name].shape, is_2d)
    ]
    found += [f"{n} is missing" for n in fresh if not (is_2d and _is_over_time(n))]
    found += [f"{name} is left over" for name in weights if name not in own]
    if found:
        change = _sizes_to_change(autoencoder.size, weights)
        raise ValueError(
            f"the autoencoder in {source} does not fit this one: {'; '.join(found[:3])}"
            f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}; "
            + (f"set {change}" if change else "it needs the tensors of this autoencoder, or of its 2D one")
        )
    for name, weight in weights.items():
        target = own[name]
        if target.dim() == 5 and weight.dim() == 4:
            target.zero_()
            target = centre_tap(target)
        target.copy_(weight)
    return fresh


def _is_over_time(name, weight=None):
    return ".time." in name or ".temporal_attention." in name or (weight is not None and weight.dim() == 5)


def _fits(theirs, ours, is_2d):
    is_inflated = is_2d and len(ours) == 5 and len(theirs) == 4 and ours[:2] + ours[3:] == theirs
    return theirs == ours or is_inflated


def _sizes_to_change(size, weights) -> str:
    """autoencoder.* overrides that turn `size` into that of `weights`; empty where they do not tell."""
    try:
        widths = [weights[f"encoder.levels.{level}.0.conv1.space.weight"].shape[0] for level in range(4)]
        latent_channels = weights["encoder.conv_out.space.weight"].shape[0] // 2
    except KeyError:
        return ""
    base_width, blocks = math.gcd(*widths), 0
    while f"encoder.levels.3.{blocks}.conv1.space.weight" in weights:  # the last level has nothing else
        blocks += 1
    theirs = {"latent_channels": latent_channels, "blocks_per_level": blocks}
    if widths != [size.base_width * multiplier for multiplier in size.multipliers]:
        theirs["base_width"] = base_width
        theirs["multipliers"] = tuple(width // base_width for width in widths)
    times = [w for name, w in weights.items() if name.endswith("conv_in.time.conv.weight")]
    wholes = [w for name, w in weights.items() if name.endswith("conv_in.space.weight") and w.dim() == 5]
    if times or wholes:
        theirs["inflation"] = "2.5D" if times else "3D"
        theirs["temporal_kernel"] = times[0].shape[2] if times else wholes[0].shape[2]
    return " ".join(
        f"autoencoder.{name}={'[' + ','.join(map(str, value)) + ']' if isinstance(value, tuple) else value}"
        for name, value in theirs.items()
        if value != getattr(size, name)
    )


def is_diffusers_folder(folder) -> bool:
    """Whether diffusers saved a model there."""
    return Path(folder, DIFFUSERS_CONFIG).is_file()


def read_diffusers(folder) -> dict[str, Tensor]:
    """Weights of diffusers' AutoencoderKL in `folder` under the names of a 2D `TemporalAutoencoder`.

    At least float32. ValueError where the folder holds another model, one with parts this autoencoder has
    not, or no weights. The 1x1 convolution after its encoder is multiplied into the last one; that before its
    decoder stays.
    """
    config = _read_config(folder)
    theirs = _read_weights(folder)
    try:
        ours = _renamed(theirs, config)
    except KeyError as error:
        raise ValueError(
            f"{folder}: its weights lack {error.args[0]}, which its {DIFFUSERS_CONFIG} asks for; give a "
            "folder whose two files are of one model"
        ) from None
    if theirs:
        raise ValueError(
            f"{folder}: this autoencoder has no place for {', '.join(sorted(theirs)[:3])}"
            f"{f' and {len(theirs) - 3} more' if len(theirs) > 3 else ''}; give an AutoencoderKL of plain "
            "blocks (DownEncoderBlock2D, UpDecoderBlock2D)"
        )
    return ours


def _read_config(folder):
    path = Path(folder, DIFFUSERS_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is no readable JSON object ({error}); give a folder that diffusers saved"
        ) from None
    if kind != "AutoencoderKL":
        raise ValueError(
            f"{folder} holds diffusers' {kind}; only an image autoencoder, AutoencoderKL, can be inflated"
        )
    config = _DIFFUSERS_DEFAULTS | config
    for name, needed in _DIFFUSERS_NEEDED.items():
        if config[name] != needed:
            raise ValueError(
                f"{folder}: its {name} is {config[name]!r}, this autoencoder's is {needed!r}; give a folder "
                "with that"
            )
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    if len(widths) != 4:
        raise ValueError(
            f"{folder}: its block_out_channels {list(widths)} are {len(widths)} levels; this autoencoder has "
            "four, which make a frame 8 times smaller; give a folder with four"
        )
    for width in widths:
        if groups != Norm(width).num_groups:
            raise ValueError(
                f"{folder}: its norms have {groups} groups, this autoencoder's {Norm(width).num_groups} at "
                f"width {width} (32, fewer under 128 channels); give a folder with LDM's 32 groups and "
                "widths of 128 or more"
            )
    return config


def _read_weights(folder):
    for name in _DIFFUSERS_WEIGHTS:
        path = Path(folder, name)
        if not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
            # half precision would round the product with quant_conv once more
            return {k: w.to(torch.promote_types(w.dtype, torch.float32)) for k, w in weights.items()}
        except Exception as error:  # both libraries raise their own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} can not be read ({reason}); copy or save it again") from None
    raise ValueError(f"{folder} holds no weights; it needs {' or '.join(_DIFFUSERS_WEIGHTS)}")


def _renamed(theirs, config):
    """Ours of `theirs`, which are taken out of it; KeyError for one that is not there."""
    ours, num_levels = {}, len(config["block_out_channels"])
    for side in ("encoder", "decoder"):
        down = side == "encoder"
        for end in ("conv_in", "conv_out"):
            _copy(ours, f"{side}.{end}.space", theirs, f"{side}.{end}")
        _copy(ours, f"{side}.norm", theirs, f"{side}.conv_norm_out")
        num_blocks = config["layers_per_block"] + (0 if down else 1)
        for level in range(num_levels):
            their_level = f"{side}.{'down' if down else 'up'}_blocks.{level}"
            for block in range(num_blocks):
                own = f"{side}.levels.{level}.{'' if down else 'blocks.'}{block}"
                _copy_block(ours, own, theirs, f"{their_level}.resnets.{block}")
            if level < num_levels - 1:
                own = f"{side}.levels.{level}.{f'{num_blocks}.space' if down else 'up.conv.space'}"
                scaler = "downsamplers" if down else "upsamplers"
                _copy(ours, own, theirs, f"{their_level}.{scaler}.0.conv")
        middle, their_middle = f"{side}.middle", f"{side}.mid_block"
        for number in (0, 1):
            _copy_block(ours, f"{middle}.block{number + 1}", theirs, f"{their_middle}.resnets.{number}")
        _copy_attention(ours, f"{middle}.attention", theirs, f"{their_middle}.attentions.0")
    _copy_quant(ours, theirs, config["latent_channels"])
    return ours


def _copy(ours, own, theirs, their):
    for part in ("weight", "bias"):
        ours[f"{own}.{part}"] = theirs.pop(f"{their}.{part}")


def _copy_linear(ours, own, theirs, their):
    """Of a 1x1 convolution or a linear layer."""
    _copy(ours, own, theirs, their)
    ours[f"{own}.weight"] = ours[f"{own}.weight"].flatten(1)


def _copy_block(ours, own, theirs, their):
    for number in (1, 2):
        _copy(ours, f"{own}.norm{number}", theirs, f"{their}.norm{number}")
        _copy(ours, f"{own}.conv{number}.space", theirs, f"{their}.conv{number}")
    if f"{their}.conv_shortcut.weight" in theirs:
        _copy_linear(ours, f"{own}.shortcut", theirs, f"{their}.conv_shortcut")


def _copy_attention(ours, own, theirs, their):
    for new, old in _OLD_ATTENTION.items():
        for part in ("weight", "bias"):
            if f"{their}.{old}.{part}" in theirs:
                theirs[f"{their}.{new}.{part}"] = theirs.pop(f"{their}.{old}.{part}")
    _copy(ours, f"{own}.norm", theirs, f"{their}.group_norm")
    _copy_linear(ours, f"{own}.out", theirs, f"{their}.to_out.0")
    for part in ("weight", "bias"):
        qkv = [theirs.pop(f"{their}.to_{name}.{part}") for name in "qkv"]
        ours[f"{own}.qkv.{part}"] = torch.cat(qkv).flatten(1) if part == "weight" else torch.cat(qkv)


def _copy_quant(ours, theirs, latent_channels):
    """`quant_conv` into the encoder's last convolution, `post_quant_conv` as the decoder's first layer."""
    if "quant_conv.weight" in theirs:
        quant_OI = theirs.pop("quant_conv.weight").flatten(1)
        conv = "encoder.conv_out.space"
        ours[f"{conv}.weight"] = torch.einsum("oi,i...->o...", quant_OI, ours[f"{conv}.weight"])
        ours[f"{conv}.bias"] = quant_OI @ ours[f"{conv}.bias"] + theirs.pop("quant_conv.bias")
    post = "decoder.post_quant"
    if "post_quant_conv.weight" in theirs:
        _copy_linear(ours, post, theirs, "post_quant_conv")
    else:
        ours[f"{post}.weight"] = torch.eye(latent_channels)
        ours[f"{post}.bias"] = torch.zeros(latent_channels)
