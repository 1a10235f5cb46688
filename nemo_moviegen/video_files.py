"""Videos as files people open: H.264 mp4, contact sheets, and frames read back. No torch.

Axis letters: T frames, C channels (RGB), H W height and width.
"""

import itertools
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

CAPTION_PX = 15
_MARGIN_PX = 8
_NARROWEST_SHEET_PX = 560


def to_uint8(video_TCHW) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of a video (torch or numpy) in [-1, 1]; values outside are clipped.

    Raises ValueError where the video is not [T, 3, H, W] with T >= 1, or holds NaN or infinity.
    """
    video_TCHW = np.asarray(video_TCHW, dtype=np.float32)
    if video_TCHW.ndim != 4 or video_TCHW.shape[1] != 3 or 0 in video_TCHW.shape:
        raise ValueError(f"a video of shape {list(video_TCHW.shape)} is not [frames, 3, height, width]")
    if not np.isfinite(video_TCHW).all():
        raise ValueError("the video holds NaN or infinity: the model that made it has diverged")
    frames_TCHW = np.rint((np.clip(video_TCHW, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(frames_TCHW.transpose(0, 2, 3, 1))


def write_mp4(video_TCHW, path, fps) -> Path:
    """Write a video in [-1, 1] as H.264 yuv420p mp4, which every player and browser opens; returns the path.

    Odd sizes get their last row or column twice, for 4:2:0 colour needs even sides. Raises ValueError for a
    wrong shape, a non-finite value or a frame rate that is not positive.
    """
    return stream_mp4([video_TCHW], path, fps)


def stream_mp4(chunks, path, fps) -> Path:
    """`write_mp4` of a video that comes in chunks [t, 3, H, W]: each is encoded and let go.

    The file appears under its name when it is whole. ValueError also where no chunk comes.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if not fps > 0:
        raise ValueError(f"fps is {fps}; a video needs more than 0 frames a second")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        frames = (_even_sides(frame_HWC) for chunk in chunks for frame_HWC in to_uint8(chunk))
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{path}: no frame came to be written")
        with av.open(str(part), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "15", "preset": "medium"}
            # Tagged: players guess the matrix of an untagged file from its size and shift the colours.
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
            for frame_HWC in itertools.chain([first], frames):
                frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _even_sides(frame_HWC):
    height, width = frame_HWC.shape[:2]
    return np.pad(frame_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def write_png(frame_CHW, path) -> Path:
    """Write one frame in [-1, 1] as PNG; returns the path."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(np.asarray(frame_CHW)[None])[0]).save(path)
    return path


def read_frames(path, start_seconds=0.0, end_seconds=math.inf) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of an image or video whose time t obeys start <= t < end.

    An image has one frame, at time 0. Raises ValueError naming the file where it is missing, is no image or
    video, or has no frame in that interval.
    """
    import av
    from av.error import FFmpegError

    frames = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                seconds = frame.time or 0.0
                if seconds >= end_seconds - 1e-6:
                    break
                if seconds >= start_seconds - 1e-6:
                    frames.append(frame.to_ndarray(format="rgb24"))
    except (FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path}: not a readable image or video ({error}); check the file") from None
    if not frames:
        raise ValueError(f"{path}: no frame between {start_seconds} and {end_seconds} seconds")
    return np.stack(frames)


def pick_frames(num_frames, num_picked) -> list[int]:
    """At most `num_picked` frame numbers, evenly spaced, with the first and the last."""
    if num_frames <= num_picked:
        return list(range(num_frames))
    return [round(i * (num_frames - 1) / max(num_picked - 1, 1)) for i in range(num_picked)]


def contact_sheet(videos, captions, path, *, num_columns=8, cell_px=120) -> Path:
    """Write one PNG with a captioned row of frames for each video, [T, 3, H, W] in [-1, 1]; returns it.

    Rows hold at most `num_columns` frames, evenly spaced from first to last, their longer side `cell_px`.
    Raises ValueError where videos and captions do not pair up.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions: give one caption for each video"
        )
    font = ImageFont.load_default(size=CAPTION_PX)
    strips = [_strip(to_uint8(video), num_columns, cell_px) for video in videos]
    width = max(_NARROWEST_SHEET_PX, *(strip.width for strip in strips)) + 2 * _MARGIN_PX
    texts = [_wrap(caption, font, width - 2 * _MARGIN_PX) for caption in captions]
    heights = [_text_height(t) + s.height + 2 * _MARGIN_PX for t, s in zip(texts, strips, strict=True)]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN_PX
    for strip, text, height in zip(strips, texts, heights, strict=True):
        draw.multiline_text((_MARGIN_PX, top), text, fill=(34, 34, 34), font=font, spacing=4)
        sheet.paste(strip, (_MARGIN_PX, top + _text_height(text)))
        top += height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _strip(frames_THWC, num_columns, cell_px):
    from PIL import Image

    height, width = frames_THWC.shape[1:3]
    scale = cell_px / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    picked = [frames_THWC[i] for i in pick_frames(len(frames_THWC), num_columns)]
    strip = Image.new("RGB", (len(picked) * (cell[0] + 2) - 2, cell[1]), "white")
    for column, frame in enumerate(picked):
        # Whole-pixel enlargement of small frames shows what the model made, not what an interpolation added.
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        strip.paste(Image.fromarray(frame).resize(cell, resample), (column * (cell[0] + 2), 0))
    return strip


def _text_height(text):
    return (text.count("\n") + 1) * (CAPTION_PX + 6) + 2


def _wrap(text, font, width_px):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
