"""Inflation of a 2D autoencoder: diffusers' AutoencoderKL with random weights is the reference."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from nemo_moviegen.sizes import AutoencoderSize
from nemo_moviegen.tae.inflate import is_diffusers_folder, load_weights, read_diffusers
from nemo_moviegen.tae.model import TemporalAutoencoder

EXACT = 1e-10  # float64 and a few dozen layers
WIDTH = 16  # of all levels: then 4 groups are LDM's rule at each
SAFETENSORS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
SIZE = AutoencoderSize(base_width=WIDTH, multipliers=(1, 1, 1, 1), blocks_per_level=1, latent_channels=4)
OWN = AutoencoderSize(base_width=4, multipliers=(1, 2, 2, 3), blocks_per_level=1, latent_channels=4)


def of(size, inflation, **changed):
    return replace(size, inflation=inflation, temporal_compression=1 if inflation == "2D" else 8, **changed)


@torch.no_grad()
def randomised(model, seed=1):
    """In float64, every weight, bias and norm random, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.double().named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


def image_autoencoder(widths=(WIDTH,) * 4, groups=WIDTH // 4, **changed):
    return randomised(
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=widths,
            norm_num_groups=groups,
            **changed,
        )
    )


def inflated(folder, size=SIZE, inflation="2.5D"):
    model = TemporalAutoencoder(of(size, inflation)).double()
    load_weights(model, read_diffusers(folder), str(folder))
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    return image_autoencoder()


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_config(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def change_weights(folder, change):
    weights = load_file(folder / SAFETENSORS)
    change(weights)
    save_file(weights, folder / SAFETENSORS)


@torch.no_grad()
def assert_each_frame_alike(ours, encode, decode, num_frames, height=16, width=24, within=EXACT):
    """`encode` and `decode` are of images; latent t is to be that of frame 8t, and to decode to 8 like it."""
    compression = ours.size.temporal_compression
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, num_frames, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1
    posterior = ours.encode(video)
    mean, logvar = encode(video[0, ::compression])
    torch.testing.assert_close(posterior.mean_BTCHW[0], mean, rtol=0, atol=within)
    torch.testing.assert_close(posterior.logvar_BTCHW[0], logvar, rtol=0, atol=within)
    latent = torch.randn(posterior.mean_BTCHW.shape, generator=generator, dtype=torch.float64)
    frames = decode(latent[0]).repeat_interleave(compression, dim=0)[:num_frames]
    torch.testing.assert_close(ours.decode(latent, num_frames)[0], frames, rtol=0, atol=within)
    assert mean.std() > 0.1 and frames.std() > 0.1, "weights that hide nothing"


def assert_like_diffusers(ours, theirs, num_frames=9, **changed):
    def encode(images):
        posterior = theirs.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    assert_each_frame_alike(ours, encode, lambda z: theirs.decode(z).sample, num_frames, **changed)


@pytest.mark.parametrize("num_frames", [1, 9, 17])
@pytest.mark.parametrize("inflation", ["2D", "2.5D", "3D"])
def test_each_frame_is_what_diffusers_makes_of_it(saved, theirs, inflation, num_frames):
    """Seen to catch: queries and keys swapped, the bias of quant_conv dropped, quant_conv transposed, norms
    swapped, post_quant_conv folded into the convolution after it (whose padding knows no bias), the tap after
    the middle one.
    """
    assert is_diffusers_folder(saved)
    assert_like_diffusers(inflated(saved, inflation=inflation), theirs, num_frames)


def test_levels_of_other_widths_with_published_groups_and_blocks(tmp_path):
    """Seen to catch: the shortcut's 1x1 convolution transposed."""
    theirs = image_autoencoder((128, 256, 128, 256), groups=32, latent_channels=4, layers_per_block=2)
    theirs.save_pretrained(tmp_path)
    size = AutoencoderSize(base_width=128, multipliers=(1, 2, 1, 2), blocks_per_level=2, latent_channels=4)
    assert_like_diffusers(inflated(tmp_path, size), theirs, num_frames=2, height=8, width=16)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("latent_channels", [4, 16])
@pytest.mark.parametrize("quant", [True, False])
def test_what_was_published_loads_with_and_without_quant_conv(tmp_path, quant, latent_channels, safe):
    """Stable Diffusion 1 to XL: 4 channels with both 1x1 convolutions; 3 and FLUX: 16 without."""
    quants = {"use_quant_conv": quant, "use_post_quant_conv": quant}
    theirs = image_autoencoder(latent_channels=latent_channels, **quants)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / (SAFETENSORS if safe else BIN)).is_file()
    assert_like_diffusers(inflated(tmp_path, replace(SIZE, latent_channels=latent_channels)), theirs)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_half_precision_load_as_they_are(tmp_path, variant):
    """Seen to catch: quant_conv folded in half precision."""
    theirs = image_autoencoder().half()
    theirs.save_pretrained(tmp_path, variant=variant)
    assert_like_diffusers(inflated(tmp_path), theirs.double(), within=1e-5)  # float32 until folded


def test_folders_with_the_attention_names_of_old_load(folder, theirs):
    """Seen to catch: queries and keys swapped."""

    def rename(weights):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [name for name in weights if f".{new}." in name]:
                weights[name.replace(new, old)] = weights.pop(name)

    change_weights(folder, rename)
    assert any("proj_attn" in name for name in load_file(folder / SAFETENSORS))
    assert_like_diffusers(inflated(folder), theirs)


@pytest.mark.parametrize("num_frames", [1, 9, 17])
@pytest.mark.parametrize(("inflation", "kernel"), [("2.5D", 3), ("3D", 3), ("3D", 5)])
def test_our_own_image_autoencoder_inflates_likewise(inflation, kernel, num_frames):
    """Seen to catch: the tap after the middle one, taps beside it left as they were."""
    image = randomised(TemporalAutoencoder(of(OWN, "2D")))
    ours = TemporalAutoencoder(of(OWN, inflation, temporal_kernel=kernel)).double()
    for parameter in (parameter for parameter in ours.parameters() if parameter.dim() == 5):
        parameter.data.fill_(1.0)
    fresh = load_weights(ours, image.state_dict(), "image")
    assert fresh and all(".time." in name or ".temporal_attention." in name for name in fresh)

    def encode(images):
        posterior = image.encode(images[:, None])
        return posterior.mean_BTCHW[:, 0], posterior.logvar_BTCHW[:, 0]

    assert_each_frame_alike(ours, encode, lambda z: image.decode(z[:, None])[:, 0], num_frames)


@pytest.mark.parametrize("inflation", ["2D", "2.5D", "3D"])
def test_weights_of_the_same_size_are_taken_over_whole(inflation):
    one, other = (randomised(TemporalAutoencoder(of(OWN, inflation)), seed) for seed in (1, 2))
    assert load_weights(other, one.state_dict(), "one") == []
    assert all(torch.equal(w, one.state_dict()[name]) for name, w in other.state_dict().items())


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_what_starts_as_the_identity_over_time_learns(inflation):
    """Attention adds zero by its output alone: its other weights move once that has."""
    torch.manual_seed(0)
    ours = TemporalAutoencoder(of(OWN, inflation)).double()
    load_weights(ours, randomised(TemporalAutoencoder(of(OWN, "2D"))).state_dict(), "image")
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        video = torch.rand(1, 17, 3, 16, 24, dtype=torch.float64) * 2 - 1
        rebuilt = ours.decode(ours.encode(video).mean_BTCHW, num_frames=17)
        (rebuilt - torch.randn_like(rebuilt)).square().mean().backward()
        for name, parameter in ours.named_parameters():
            over_time = parameter.dim() == 5 or ".time." in name or ".temporal_attention." in name
            waits = step == 0 and ".temporal_attention." in name and ".out." not in name
            if over_time and not waits:  # of whole convolutions, the taps that inflation left at zero
                gradient = parameter.grad[:, :, [0, 2]] if parameter.dim() == 5 else parameter.grad
                assert gradient.abs().amax() > 0, name
        optimizer.step()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan; only an image autoencoder, AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn is 'relu', this autoencoder's is 'silu'"),
        ({"in_channels": 1}, "in_channels is 1, this autoencoder's is 3"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"norm_num_groups": 8}, "8 groups, this autoencoder's 4 at width 16 .*32 groups"),
        ({"block_out_channels": [16, 16, 32, 32]}, "4 groups, this autoencoder's 8 at width 32"),
        ({"block_out_channels": [16, 16, 16]}, "3 levels; this autoencoder has four"),
        ({"layers_per_block": 2}, r"lack encoder\.down_blocks\.0\.resnets\.1\.norm1\.weight"),
    ],
)
def test_another_model_is_refused(folder, changed, says):
    """Seen to catch: groups checked at the first width alone."""
    change_config(folder, **changed)
    with pytest.raises(ValueError, match=says):
        read_diffusers(folder)


@pytest.mark.parametrize("name", ["post_quant_conv.bias", "decoder.mid_block.attentions.0.to_v.weight"])
def test_a_missing_tensor_is_named(folder, name):
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lack {name}.*two files are of one model"):
        read_diffusers(folder)


def test_tensors_without_a_place_are_named(folder):
    surplus = {f"encoder.extra.{number}": torch.zeros(1) for number in range(5)}
    change_weights(folder, lambda weights: weights.update(surplus))
    with pytest.raises(ValueError, match=r"no place for encoder\.extra\.0, .*and 2 more; give .*plain"):
        read_diffusers(folder)


def test_files_that_are_absent_or_damaged_are_refused(folder):
    (folder / SAFETENSORS).write_bytes((folder / SAFETENSORS).read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=rf"{SAFETENSORS} can not be read \(SafetensorError: .*save it again"
    ):
        read_diffusers(folder)
    (folder / SAFETENSORS).unlink()
    (folder / BIN).write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=f"{BIN} can not be read"):
        read_diffusers(folder)
    (folder / BIN).unlink()
    with pytest.raises(ValueError, match=f"no weights; it needs {SAFETENSORS} or {BIN}"):
        read_diffusers(folder)
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is no readable JSON object"):
            read_diffusers(folder)
    (folder / "config.json").unlink()
    assert not is_diffusers_folder(folder)


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (replace(SIZE, latent_channels=16), r"set autoencoder\.latent_channels=4$"),
        (replace(SIZE, blocks_per_level=2), r"set autoencoder\.blocks_per_level=1$"),
        (replace(SIZE, base_width=8), r"set autoencoder\.base_width=16$"),
        (OWN, r"set autoencoder\.base_width=16 autoencoder\.multipliers=\[1,1,1,1\]$"),
    ],
)
def test_an_autoencoder_of_another_size_is_told_what_to_set_and_left_as_it_was(saved, size, change):
    """Seen to catch: weights written before all are compared."""
    model = TemporalAutoencoder(size)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"(?s)in {saved} does not fit this one: .* and .* more; {change}"):
        load_weights(model, read_diffusers(saved), str(saved))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (of(OWN, "2D"), r"set autoencoder\.inflation=2\.5D$"),
        (of(OWN, "3D"), r"set autoencoder\.inflation=2\.5D$"),
        (replace(OWN, temporal_kernel=5), r"set autoencoder\.temporal_kernel=3$"),
    ],
)
def test_layers_over_time_of_another_kind_are_refused(size, change):
    weights = TemporalAutoencoder(OWN).state_dict()
    with pytest.raises(ValueError, match=change):
        load_weights(TemporalAutoencoder(size), weights, "run")


@pytest.mark.parametrize("inflation", ["2.5D", "3D"])
def test_a_temporal_autoencoder_that_lost_some_layers_over_time_is_no_2d_one(inflation):
    """Seen to catch: what is missing of them left fresh without a word."""
    weights = TemporalAutoencoder(of(OWN, inflation)).state_dict()
    del weights["decoder.middle.temporal_attention.out.bias"]
    with pytest.raises(ValueError, match=r"out\.bias is missing; it needs the tensors"):
        load_weights(TemporalAutoencoder(of(OWN, inflation)), weights, "run")
