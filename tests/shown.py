"""Test videos, the loader over them, and the same frames from first principles."""

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange

from nemo_moviegen.data.clips import Clip
from nemo_moviegen.data.cutting import write_video
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.synthetic import draw_spec, render
from nemo_moviegen.recipe import Bucket

BUCKET = Bucket(num_frames=8, height_px=36, width_px=48, fps=16)

# [-1, 1] has 255 steps of 0.0078. The reference computes in float64 what FFmpeg does in 16 bits.
MEAN_ERROR, LARGEST_ERROR = 0.0001, 0.001


def a_video(path, seed=0, num_frames=16, size_px=96, fps=16, **write):
    return write_video(path, render(draw_spec(seed, 0), num_frames, size_px, fps), fps, **write)


def whole(path, clip_id=None):
    """The file as one clip, whatever it holds."""
    return Clip(
        clip_id=clip_id or path.stem,
        path=str(path),
        kind="video",
        start_seconds=0.0,
        end_seconds=1.0,
        source_fps=16.0,
        width_px=96,
        height_px=96,
        codec="",
        caption="",
    )


def reference(clip, bucket):
    """[T, C, H, W] by numpy, in float64: decode all, take the nearest by time, then `fitted`."""
    with av.open(clip.path) as container:
        decoded = [(frame.time, frame) for frame in container.decode(video=0)]
        times = np.array([time for time, _ in decoded]) - decoded[0][0]
        count = 1 if clip.kind == "image" else bucket.num_frames
        nearest = [np.abs(times - (clip.start_seconds + k / bucket.fps)).argmin() for k in range(count)]
        # H.264 and H.265 keep colour at the left of its two pixels if they do not say, others between them
        shift = 0.25 if container.streams.video[0].codec_context.name in ("h264", "hevc") else 0.0
        return torch.from_numpy(np.stack([fitted(decoded[n][1], bucket, shift) for n in nearest]))


def fitted(frame, bucket, shift=0.0):
    """[C, H, W] in [-1, 1]: each 8-bit plane of a frame scaled to cover the bucket, BT.601, cropped."""
    scale = max(bucket.height_px / frame.height, bucket.width_px / frame.width)
    height, width = round(frame.height * scale), round(frame.width * scale)
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    black, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    planes = []
    for number, plane in enumerate(frame.planes):
        plane_HW = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        across = triangle(plane.width, width, shift=shift if number else 0)
        planes.append(triangle(plane.height, height) @ plane_HW.astype(float) @ across.T)
    y, blue, red = (planes[0] - black) / luma, (planes[1] - 128) / chroma, (planes[2] - 128) / chroma
    rgb = [y + 1.402 * red, y - (0.202008 * blue + 0.419198 * red) / 0.587, y + 1.772 * blue]
    top, left = (height - bucket.height_px) // 2, (width - bucket.width_px) // 2
    rgb_CHW = np.stack(rgb)[:, top : top + bucket.height_px, left : left + bucket.width_px]
    return rgb_CHW.clip(0, 1) * 2 - 1


def triangle(size, new_size, shift=0.0):
    """[new_size, size]: antialiased linear interpolation; samples lie `shift` before their pixel's middle."""
    scale = size / new_size
    middle = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5 + shift
    weights = (1 - np.abs(np.arange(-size, 2 * size) - middle) / max(scale, 1)).clip(0)
    inside = weights[:, size : 2 * size].copy()
    inside[:, 0] += weights[:, :size].sum(1)  # outside, the border goes on
    inside[:, -1] += weights[:, 2 * size :].sum(1)
    return inside / inside.sum(1, keepdims=True)


def load(clips, bucket=BUCKET, order=None, batch_size=4, **keywords):
    """Every sample by row, and the loader."""
    order = range(len(clips)) if order is None else order
    loader = ClipLoader(clips, bucket, batch_size=batch_size, order=order, **keywords)
    samples = {}
    for video, rows in loader:
        samples |= {row: video[place] for place, row in enumerate(rows)}
    return samples, loader


def assert_close(video, expected, mean=MEAN_ERROR, largest=LARGEST_ERROR):
    error = (video - expected).abs()
    assert error.mean() < mean and error.max() < largest


def spoil(kind, path):
    """Make the good VP9 file at `path` bad."""
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "corrupt":
        # the packets lie before the table of contents, which stays readable
        start = data.index(b"mdat") + 40
        path.write_bytes(data[:start] + b"\xff" * 600 + data[start + 600 :])
    elif kind == "too short":
        a_video(path, num_frames=5)
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=48000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux([*stream.encode(frame), *stream.encode()])
    else:
        contents = {"empty": b"", "truncated": data[: len(data) // 2], "not a video": b"hello " * 500}
        path.write_bytes(contents[kind])
