"""`moviegen bench loader`: raw decode, latent reading, memory over many samples, time to a first batch."""

import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from nemo_moviegen.bench.decode import bench_decode, find_clips
from nemo_moviegen.bench.measure import environment, table, write_json
from nemo_moviegen.inputs import Bucket

PARTS = ("decode", "latents", "memory", "start")
FILES = (
    ("vp9-1280x720.webm", "libvpx-vp9", 1280, 720),
    ("vp9-640x360.webm", "libvpx-vp9", 640, 360),
    ("h264-1280x720.mp4", "libx264", 1280, 720),
)
"""What is rendered where no folder is given: the film that comes with the package, there and back, 10 s."""
_SOAK = Bucket(num_frames=16, height_px=64, width_px=64, fps=16)


def bench_loader(
    parts=PARTS,
    *,
    videos=None,
    bucket=None,
    batch_size=4,
    rounds=5,
    num_samples=10_000,
    output=None,
    log=print,
) -> dict:
    """Run the parts and print a table for each as it ends; everything found, also in the JSON `output`.

    `videos` is a folder of files to decode; without it, FILES are rendered to a temporary one. Memory is that
    of `num_samples` samples through one loader.
    """
    bucket = bucket or Bucket(num_frames=64, height_px=256, width_px=256, fps=16)
    found = {"environment": environment("av", "nvidia-dali-cuda120", "torchcodec")}
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        scratch = Path(scratch)
        if "decode" in parts:
            found["decode"] = _decode(
                videos or render_films(scratch / "films"), bucket, batch_size, rounds, log
            )
        if "latents" in parts:
            from nemo_moviegen.bench.latents import bench_all

            found["latents"] = bench_all(scratch / "latents", rounds, log)
        if "memory" in parts:
            found["memory"] = soak(scratch / "clips", num_samples)
            log(f"resident memory over {num_samples} samples: {found['memory']}")
        if "start" in parts:
            found["start"] = first_batch(scratch / "start")
            log(f"seconds to the first batch: {found['start']}")
    if output:
        write_json(output, found)
    return found


def render_films(folder) -> Path:
    """The FILES in `folder`: 250 frames of real film, 25 a second, a key frame every two seconds."""
    import av

    from nemo_moviegen.data.clips import BIG_BUCK_BUNNY

    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(BIG_BUCK_BUNNY)) as container:
        film = [frame.reformat(format="yuv420p") for frame in container.decode(video=0)]
    for name, codec, width, height in FILES:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.gop_size = 50
            stream.options = {"crf": "21", "preset": "medium"}
            if codec == "libvpx-vp9":
                stream.options = {"crf": "32", "b": "0", "deadline": "good", "cpu-used": "5", "row-mt": "1"}
            for number, frame in enumerate(itertools.chain(film, reversed(film))):
                scaled = frame.reformat(width=width, height=height, interpolation="BICUBIC")
                scaled.pts, scaled.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(scaled))
            container.mux(stream.encode())
    return folder


def soak(folder, num_samples, batch_size=8, warm_up=1000) -> dict:
    """Resident MiB while clips of 64 px, VP9 and H.264, go through one loader, again and again.

    It is read every 100 samples after `warm_up`; what decoders hold at that moment lets it swing by a tenth.
    Keys: samples, early and late (medians of the first and the last quarter), growth (of these), most.
    """
    import psutil

    from nemo_moviegen.data.cutting import cut_clips, write_video
    from nemo_moviegen.data.dali import ClipLoader
    from nemo_moviegen.data.synthetic import draw_spec, render

    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for seed in range(32):
        film, codec = render(draw_spec(seed, 0), 16, 64, 16), ("libvpx-vp9", "libx264")[seed % 2]
        clips += cut_clips(write_video(folder / f"{seed}.mp4", film, 16, codec), 1.0)
    order = (place % len(clips) for place in range(num_samples))
    resident, process, seen = [], psutil.Process(), 0
    for _, rows in ClipLoader(clips, _SOAK, batch_size=batch_size, order=order, num_threads=2):
        seen += len(rows)
        if seen >= warm_up and seen % 100 < batch_size:
            resident.append(round(process.memory_info().rss / 2**20, 1))
    quarter = max(1, len(resident) // 4)
    early, late = statistics.median(resident[:quarter]), statistics.median(resident[-quarter:])
    growth = round(late / early - 1, 4)
    return {"samples": seen, "early": early, "late": late, "growth": growth, "most": max(resident)}


def first_batch(folder, num_clips=100_000) -> dict:
    """Seconds from a manifest of so many clips to the first batch of a loader over it, after all imports."""
    from nemo_moviegen.data.clips import read_manifest, write_manifest
    from nemo_moviegen.data.cutting import cut_clips, write_video
    from nemo_moviegen.data.dali import ClipLoader
    from nemo_moviegen.data.synthetic import draw_spec, render

    folder.mkdir(parents=True, exist_ok=True)
    (clip,) = cut_clips(write_video(folder / "a.mp4", render(draw_spec(0, 0), 16, 64, 16), 16), 1.0)
    manifest = write_manifest(
        folder / "manifest.parquet", [replace(clip, clip_id=f"clip{n}") for n in range(num_clips)]
    )
    list(ClipLoader([clip], _SOAK, batch_size=1, order=[0]))  # imports
    started = time.perf_counter()
    clips = read_manifest(manifest)
    manifest_seconds = time.perf_counter() - started
    order = np.random.default_rng(0).permutation(len(clips))
    batches = iter(ClipLoader(clips, _SOAK, batch_size=8, order=order))
    next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return {"clips": num_clips, "manifest": round(manifest_seconds, 3), "first batch": round(seconds, 3)}


def _decode(folder, bucket, batch_size, rounds, log):
    """What `bench_decode` found for each kind of file: its codec and size."""
    found, kinds = {}, {}
    for clip in find_clips(folder, bucket):
        kinds.setdefault(f"{clip.codec} {clip.width_px}x{clip.height_px}", []).append(clip)
    for kind, clips in kinds.items():
        found[kind] = bench_decode(clips, bucket, batch_size=batch_size, num_batches=4, rounds=rounds)
        size = f"{bucket.num_frames} x {bucket.height_px} x {bucket.width_px} at {bucket.fps:g} fps"
        log(table(f"{kind} to {size}, batches of {batch_size}", found[kind]["rows"], found[kind]["failed"]))
    return found
