"""`moviegen bench tae`: our autoencoder beside diffusers' AutoencoderKLWan and AutoencoderKLCogVideoX.

All encode and decode the same clip in float32, with random weights, on which no time depends, and as many
parameters as ours within a twentieth; diffusers' models as they run by default, a few frames at a time. They
put 4 frames in a latent and ours 8: what is compared are pixel frames a second.
"""

import statistics
import time

import psutil
import torch

from nemo_moviegen.bench.measure import (
    empty_table,
    environment,
    growth_mib,
    measure,
    summarise,
    with_failures,
    write_json,
)
from nemo_moviegen.sizes import AutoencoderSize

PARTS = ("production", "small", "long")
PRODUCTION = {
    "frames": 33,
    "size_px": 64,
    "ours": AutoencoderSize(),
    "wan": {"base_dim": 96, "decoder_base_dim": 88},
    "cogvideox": {"block_out_channels": (96, 192, 192, 368), "norm_num_groups": 16},
}
"""114M parameters; frames that a CPU ends in seconds. 33 suits all three: Wan 4k + 1, CogVideoX 8k + 1."""
SMALL = {
    "frames": 33,
    "size_px": 128,
    "ours": AutoencoderSize(base_width=32),
    "wan": {"base_dim": 20, "decoder_base_dim": 24},
    "cogvideox": {"block_out_channels": (24, 48, 48, 88), "norm_num_groups": 8},
}
"""7M parameters."""
LONG = {"frames": (32, 256), "size_px": 128, "ours": AutoencoderSize(base_width=32)}
STREAM = "moviegen: exact stream"
"""What ratios are taken to."""
TILES = "moviegen: the paper's tiles"
WHOLE = "moviegen: whole clip"
WAN, COGVIDEOX = "diffusers AutoencoderKLWan", "diffusers AutoencoderKLCogVideoX"
_COMPRESSION = {WAN: "4x8x8", COGVIDEOX: "4x8x8"}
_WARM_UP_FRAMES = 9


def bench_autoencoder(parts=PARTS, *, rounds=3, output=None, log=print) -> dict:
    """Run the parts and print a table for each as it ends; everything found, also in the JSON `output`.

    production, small: see `bench_models`, at these sizes; long: see `bench_long`. As many threads as torch
    takes: OMP_NUM_THREADS.
    """
    found = {"environment": environment("diffusers") | {"threads": torch.get_num_threads()}}
    log(f"{found['environment']['processor']}, {found['environment']['threads']} threads, float32")
    for part, case in (("production", PRODUCTION), ("small", SMALL)):
        if part in parts:
            found[part] = bench_models(case, rounds)
            log(models_table(part, found[part]))
    if "long" in parts:
        found["long"] = bench_long(LONG)
        log(long_table(found["long"]))
    if output:
        write_json(output, found)
    return found


def bench_models(case, rounds=3) -> dict:
    """Each way once a round, in turns: {"rows": ..., "failed": {name: reason}} and what was encoded.

    A row: name, parameters, compression, latent_channels; medians over rounds of frames_per_second, that of
    encoding and of decoding alone, cpu_seconds_per_frame, which others on the machine move least, and
    growth_mib, by how much resident memory exceeded at most what it was with model and clip loaded; ratio, of
    frames a second to the first row's within a round.
    """
    makers = {
        STREAM: lambda: _ours(case, _tiling(frames=0)),
        TILES: lambda: _ours(case, _tiling()),
        WHOLE: lambda: _ours(case, None),
        WAN: lambda: _wan(case),
        COGVIDEOX: lambda: _cogvideox(case),
    }
    ways = {name: lambda make=make: _passes(make, case) for name, make in makers.items()}
    measured, failed = measure(ways, rounds)
    own = f"{case['ours'].temporal_compression}x8x8"
    rows = []
    for row in summarise(measured, STREAM) if STREAM in measured else []:
        counts = [one.counts for one in measured[row["name"]]]
        rows.append(
            {name: row[name] for name in ("name", "frames_per_second", "ratio", "ratios")}
            | {name: counts[0][name] for name in ("parameters", "latent_channels")}
            | {"compression": _COMPRESSION.get(row["name"], own)}
            | {
                f"{what}_frames_per_second": statistics.median(
                    one["frames"] / one[f"{what}_seconds"] for one in counts
                )
                for what in ("encode", "decode")
            }
            | {"cpu_seconds_per_frame": row["cpu_seconds_per_sample"] / case["frames"]}
            | {"growth_mib": statistics.median(one["growth_mib"] for one in counts)}
        )
    size = {name: case[name] for name in ("frames", "size_px")}
    return size | {"rounds": rounds, "rows": rows, "failed": failed}


def bench_long(case) -> dict:
    """By how many MiB memory grows while clips of each length are encoded and decoded, frames let go at once.

    {"size_px": ..., "growth_mib": {name: {frames: MiB}}, "failed": {name: reason}}; the clip itself is not
    counted.
    """
    ways = {
        (name, frames): lambda tiling=tiling, frames=frames: _streamed(case, tiling, frames)
        for name, tiling in ((STREAM, _tiling(frames=0)), (TILES, _tiling()))
        for frames in case["frames"]
    }
    measured, failed = measure(ways, rounds=1, warm_up=0)
    growth = {name: {} for name, _ in ways}
    for (name, frames), (one,) in measured.items():
        growth[name][frames] = one.counts["growth_mib"]
    failed = {f"{name}, {frames} frames": reason for (name, frames), reason in failed.items()}
    return {"size_px": case["size_px"], "growth_mib": growth, "failed": failed}


def models_table(title, found):
    """A rich table of what `bench_models` found."""
    size = f"{found['frames']} frames of {found['size_px']} px"
    headings = ("params", "latent", "frames/s", "encode", "decode", "CPU ms", "peak MiB", "ratio")
    made = empty_table(f"autoencoders, {title}: {size}, {found['rounds']} rounds", "way", *headings)
    for row in found["rows"]:
        made.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['compression']} x{row['latent_channels']}",
            f"{row['frames_per_second']:.2f}",
            f"{row['encode_frames_per_second']:.2f}",
            f"{row['decode_frames_per_second']:.2f}",
            f"{row['cpu_seconds_per_frame'] * 1e3:,.0f}",
            f"{row['growth_mib']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    return with_failures(made, found["failed"])


def long_table(found):
    """A rich table of what `bench_long` found."""
    title = f"peak MiB over model and clip of {found['size_px']} px, frames let go at once"
    lengths = sorted({frames for row in found["growth_mib"].values() for frames in row})
    made = empty_table(title, "way", *(f"{frames} frames" for frames in lengths))
    for name, row in found["growth_mib"].items():
        made.add_row(name, *(f"{row[frames]:,.0f}" if frames in row else "-" for frames in lengths))
    return with_failures(made, found["failed"])


def _passes(make, case):
    """A few frames to warm up, then the clip: what it took, for `measure`."""
    model, encode, decode, frames_dim = make()
    clip = _clip(case["frames"], case["size_px"])
    if frames_dim == 2:
        clip = clip.transpose(1, 2).contiguous()
    counts = {"samples": 1, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    before = psutil.Process().memory_info().rss
    for num_frames in (min(_WARM_UP_FRAMES, case["frames"]), case["frames"]):
        started = time.perf_counter()
        latent = encode(clip.narrow(frames_dim, 0, num_frames))
        encoded = time.perf_counter()
        video = decode(latent, num_frames)
        decoded = time.perf_counter()
        if video.shape[frames_dim] != num_frames:
            raise ValueError(f"{num_frames} frames came back as {video.shape[frames_dim]}")
        yield counts | {
            "frames": num_frames,
            "latent_channels": latent.shape[3 - frames_dim],
            "encode_seconds": encoded - started,
            "decode_seconds": decoded - encoded,
            "growth_mib": growth_mib(before),
        }


def _streamed(case, tiling, num_frames):
    """A clip in and out, frames let go as they come; one batch for `measure`."""
    from nemo_moviegen.tae.model import TemporalAutoencoder
    from nemo_moviegen.tae.tiling import decode_frames, encode_tiled

    autoencoder = TemporalAutoencoder(case["ours"]).eval()
    clip = _clip(num_frames, case["size_px"])
    before = psutil.Process().memory_info().rss
    latent = encode_tiled(autoencoder, clip, tiling)
    seen = sum(part.shape[1] for part in decode_frames(autoencoder, latent, num_frames, tiling))
    yield {"samples": 1, "frames": seen, "growth_mib": growth_mib(before)}


def _clip(num_frames, size_px):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, num_frames, 3, size_px, size_px, generator=generator).mul_(2).sub_(1)


def _tiling(**sizes):
    from nemo_moviegen.tae.tiling import Tiling

    return Tiling(**sizes)


def _ours(case, tiling):
    """Model, encode(clip), decode(latent, num_frames), and the dimension of their frames; as below."""
    from nemo_moviegen.tae.model import TemporalAutoencoder
    from nemo_moviegen.tae.tiling import decode_tiled, encode_tiled

    autoencoder = TemporalAutoencoder(case["ours"]).eval()
    if tiling is None:
        encode, decode = (lambda clip: autoencoder.encode(clip).mean_BTCHW), autoencoder.decode
    else:

        def encode(clip):
            return encode_tiled(autoencoder, clip, tiling)

        def decode(latent, num_frames):
            return decode_tiled(autoencoder, latent, num_frames, tiling)

    return autoencoder, torch.no_grad()(encode), torch.no_grad()(decode), 1


def _wan(case):
    from diffusers import AutoencoderKLWan

    return _diffusers(AutoencoderKLWan(**case["wan"]))


def _cogvideox(case):
    from diffusers import AutoencoderKLCogVideoX

    return _diffusers(AutoencoderKLCogVideoX(**case["cogvideox"]))


@torch.no_grad()
def _diffusers(model):
    model.eval()

    @torch.no_grad()
    def encode(clip):
        return model.encode(clip).latent_dist.mode()

    @torch.no_grad()
    def decode(latent, num_frames):
        return model.decode(latent).sample

    return model, encode, decode, 2
