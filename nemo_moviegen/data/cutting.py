"""A video file on disk: what its header says, cutting it into clips, and writing one."""

import json
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from nemo_moviegen.data.clips import Clip


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file's header says."""

    codec: str
    width_px: int
    height_px: int
    fps: float
    duration_seconds: float


def probe_video(path) -> VideoInfo:
    """Header of the video file at `path`. ValueError names a file that is missing, empty or no video."""
    import av

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: no video stream in it")
            stream = container.streams.video[0]
            seconds = (
                stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
            )
            return VideoInfo(
                codec=stream.codec_context.name,
                width_px=stream.width,
                height_px=stream.height,
                fps=float(stream.average_rate or stream.guessed_rate or 0),
                duration_seconds=float(seconds),
            )
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a video that can be opened ({error.strerror})") from None


def cut_clips(
    video, seconds, *, caption="a video clip", split="train", images=False, attributes: dict | None = None
) -> list[Clip]:
    """Non-overlapping clips of `seconds` of a video file, the rest left out; nothing is re-encoded.

    `caption` is one string for all clips or a list with one for each. With `images`, the middle frame of each
    clip follows it as an image row. ValueError if the file is no video or shorter than one clip.
    """
    info, video = probe_video(video), Path(video).resolve()
    if seconds <= 0:
        raise ValueError(f"clips of {seconds} seconds: give a length above zero")
    count = int(info.duration_seconds / seconds + 1e-6)
    if not count:
        raise ValueError(
            f"{video}: {info.duration_seconds:.2f} s is shorter than one clip of {seconds} s; cut shorter"
        )
    captions = [caption] * count if isinstance(caption, str) else list(caption)
    if len(captions) != count:
        raise ValueError(
            f"{video}: {count} clips of {seconds} s, but {len(captions)} captions; give one for each clip"
        )
    clips = []
    for index, text in enumerate(captions):
        clip = Clip(
            clip_id=f"{video.stem}-{index:05d}",
            path=str(video),
            kind="video",
            start_seconds=index * seconds,
            end_seconds=(index + 1) * seconds,
            source_fps=info.fps,
            width_px=info.width_px,
            height_px=info.height_px,
            codec=info.codec,
            caption=text,
            split=split,
            attributes=json.dumps(attributes) if attributes else "",
        )
        clips += [clip, image_of(clip, (index + 0.5) * seconds, text)] if images else [clip]
    return clips


def image_of(clip, at_seconds, caption) -> Clip:
    """The frame of `clip` nearest to `at_seconds` of its file, as an image row with its own caption."""
    return replace(
        clip,
        clip_id=f"{clip.clip_id}-image",
        kind="image",
        start_seconds=at_seconds,
        end_seconds=at_seconds,
        caption=caption,
    )


def write_video(path, video_THWC, fps, codec="libvpx-vp9", pix_fmt="yuv420p") -> Path:
    """uint8 RGB frames as a video file of near-lossless quality; written beside and renamed.

    VP9 by default, which DALI decodes on a CPU. The container follows the file's ending.
    """
    import av

    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    with av.open(str(part), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1  # small frames: threads cost more than they give
        if codec == "libvpx-vp9":
            # quality 10 of 0..63 with no bitrate cap; speed 8 costs a few ms a clip
            stream.options = {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"}
        for frame_HWC in video_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
    os.replace(part, path)
    return path
