"""Raw video to batches of frames: our loader, a plain PyTorch DataLoader around PyAV, PyAV alone, torchcodec.

All read the same clips of the same files in the same order and give float32 [B, T, 3, H, W] in [-1, 1]. The
plain ways are what one writes without this project: seek, decode, take the frames nearest in time, convert
those to RGB, resize them with torch (antialiased, on bytes, its quickest way), crop, normalise.
"""

import itertools
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.bench.measure import measure, summarise
from nemo_moviegen.data.clips import Clip
from nemo_moviegen.data.cutting import cut_clips, probe_video

PLAIN = "PyTorch DataLoader around PyAV, 2 workers"
"""What ratios are taken to."""


def bench_decode(clips, bucket, *, batch_size=4, num_batches=12, rounds=5, num_workers=2) -> dict:
    """What decoding `clips` to `bucket` costs each way: {"rows": see `summarise`, "failed": {name: reason}}.

    A round decodes `num_batches` batches each way after one to warm up. Also in it: the files' codec, sizes
    and rates, and `difference`, the mean absolute one between our frames and the plain way's in [-1, 1].
    """
    # our loader reads a row once a batch however often it comes: rows enough that none comes twice
    clips = list(clips) * -(-2 * batch_size // len(clips))
    ways = {
        "moviegen": lambda: _ours(clips, bucket, batch_size, num_batches, num_workers),
        PLAIN: lambda: _data_loader(clips, bucket, batch_size, num_batches, num_workers, resize_bytes),
        "the same, resized as float": lambda: _data_loader(
            clips, bucket, batch_size, num_batches, num_workers, resize_float
        ),
        "PyAV, one thread": lambda: _one_thread(clips, bucket, batch_size, num_batches, pyav_frames),
        "torchcodec, one thread": lambda: _one_thread(
            clips, bucket, batch_size, num_batches, torchcodec_frames
        ),
    }
    if all(clip.codec in ("vp8", "vp9", "mjpeg") for clip in clips):
        ways["moviegen, DALI decodes"] = lambda: _ours(
            clips, bucket, batch_size, num_batches, num_workers, decoder="dali"
        )
    measured, failed = measure(ways, rounds)
    return {
        "files": sorted({_describe(clip) for clip in clips}),
        "bucket": {name: getattr(bucket, name) for name in ("num_frames", "height_px", "width_px", "fps")},
        "batch_size": batch_size,
        "batches": num_batches,
        "rounds": rounds,
        "difference": difference(clips, bucket),
        "rows": summarise(measured, PLAIN),
        "failed": failed,
    }


def find_clips(folder, bucket) -> list[Clip]:
    """Clips of the bucket's length of each video in a folder, interleaved; ValueError where there is none."""
    seconds, found = bucket.num_frames / bucket.fps, []
    for path in sorted(Path(folder).iterdir()):
        try:
            if path.is_file() and probe_video(path).duration_seconds >= seconds:
                found.append(cut_clips(path, seconds))
        except ValueError:
            continue  # no video
    if not found:
        raise ValueError(f"{folder}: no video of {seconds:g} s or more in it; take fewer frames or another")
    return [clip for group in itertools.zip_longest(*found) for clip in group if clip is not None]


def difference(clips, bucket) -> float:
    """Mean absolute difference of our frames and the plain way's, over one clip of each file."""
    from nemo_moviegen.data.dali import ClipLoader

    one_each = list({clip.path: clip for clip in clips}.values())
    found = []
    for video_BTCHW, rows in ClipLoader(one_each, bucket, batch_size=1, order=range(len(one_each))):
        plain = pyav_frames(one_each[rows[0]], bucket, resize_bytes)
        found.append(float((video_BTCHW[0] - plain).abs().mean()))
    return max(found)


class PlainClips(torch.utils.data.Dataset):
    """Clips decoded by PyAV when they are asked for."""

    def __init__(self, clips, bucket, length, resize):
        self.clips, self.bucket, self.length, self.resize = clips, bucket, length, resize

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return pyav_frames(self.clips[index % len(self.clips)], self.bucket, self.resize)


def pyav_frames(clip, bucket, resize):
    """[T, C, H, W] of a clip: the frames nearest in time to k / fps after its start."""
    import av

    wanted = [clip.start_seconds + k / bucket.fps for k in range(bucket.num_frames)]
    frames, before = [], None
    with av.open(clip.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the workers share the cores already
        origin = (stream.start_time or 0) * stream.time_base
        if clip.start_seconds > 0:
            container.seek(int((clip.start_seconds + origin) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            time = float(frame.pts * stream.time_base - origin)
            if time < clip.start_seconds - 1e-3 or time >= clip.end_seconds - 1e-3:
                if time >= clip.end_seconds - 1e-3:
                    break
                continue
            before = before or (time, frame)
            while len(frames) < len(wanted) and time >= wanted[len(frames)]:
                is_after = time - wanted[len(frames)] < wanted[len(frames)] - before[0] - 1e-6
                frames.append((frame if is_after else before[1]).to_ndarray(format="rgb24"))
            before = (time, frame)
            if len(frames) == len(wanted):
                break
    frames += [before[1].to_ndarray(format="rgb24")] * (len(wanted) - len(frames))
    return resize(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), bucket)


def torchcodec_frames(clip, bucket, resize):
    """[T, C, H, W] of a clip by torchcodec; the frame shown at a time, which need not be the nearest."""
    from torchcodec.decoders import VideoDecoder

    wanted = [clip.start_seconds + k / bucket.fps for k in range(bucket.num_frames)]
    decoder = VideoDecoder(clip.path, num_ffmpeg_threads=1, seek_mode="approximate")
    return resize(decoder.get_frames_played_at(wanted).data, bucket)


def resize_bytes(video_TCHW, bucket):
    """Resized as bytes, which torch does several times faster than as float."""
    return _crop(_cover(video_TCHW, bucket), bucket).float().div_(127.5).sub_(1)


def resize_float(video_TCHW, bucket):
    """Resized as float."""
    return _crop(_cover(video_TCHW.float(), bucket), bucket).div(127.5).sub_(1)


def _cover(video_TCHW, bucket):
    height, width = video_TCHW.shape[2:]
    scale = max(bucket.height_px / height, bucket.width_px / width)
    size = [round(height * scale), round(width * scale)]
    return torch.nn.functional.interpolate(video_TCHW, size=size, mode="bilinear", antialias=True)


def _crop(video_TCHW, bucket):
    height, width = video_TCHW.shape[2:]
    top, left = (height - bucket.height_px) // 2, (width - bucket.width_px) // 2
    return video_TCHW[..., top : top + bucket.height_px, left : left + bucket.width_px]


def _ours(clips, bucket, batch_size, num_batches, num_threads, decoder=None):
    from nemo_moviegen.data.dali import ClipLoader

    order = (place % len(clips) for place in range((num_batches + 1) * batch_size))
    loader = ClipLoader(
        clips, bucket, batch_size=batch_size, order=order, num_threads=num_threads, decoder=decoder
    )
    for video_BTCHW, _ in loader:
        yield _count(video_BTCHW)


def _data_loader(clips, bucket, batch_size, num_batches, num_workers, resize):
    dataset = PlainClips(clips, bucket, (num_batches + 1) * batch_size, resize)
    for video_BTCHW in torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=num_workers):
        yield _count(video_BTCHW)


def _one_thread(clips, bucket, batch_size, num_batches, frames_of):
    torch.set_num_threads(1)
    for number in range(num_batches + 1):
        rows = [(number * batch_size + place) % len(clips) for place in range(batch_size)]
        yield _count(torch.stack([frames_of(clips[row], bucket, resize_bytes) for row in rows]))


def _count(video_BTCHW):
    return {"samples": video_BTCHW.shape[0], "frames": video_BTCHW.shape[0] * video_BTCHW.shape[1]}


def _describe(clip):
    return f"{clip.codec} {clip.width_px}x{clip.height_px} {clip.source_fps:g} fps"
