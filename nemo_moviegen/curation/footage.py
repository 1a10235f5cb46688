"""Reading videos as a curator does: facts of the header, frames upright and in order, damage reported.

Axis letters: T frames, P pairs of frames, H W height and width, C colour (RGB).
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = "1"
"""Changes with what this file makes of a video; what was scored before is then scored again."""
_HDR_TRANSFERS = (16, 18)  # PQ and HLG, in the numbers of ITU-T H.273
_LONGEST_GAP = 0.05  # share of its duration that may be missing at a video's end


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the header and the first two frames of a video say; sides are those of the upright picture."""

    codec: str
    kind: str
    """video, or image where there is one frame only."""
    fps: float
    """Mean rate where it varies."""
    duration_seconds: float
    width_px: int
    height_px: int
    bit_depth: int
    is_hdr: bool

    @property
    def columns(self) -> dict:
        """Values of the header's columns (`HEADER_COLUMNS`), and codec and kind."""
        return vars(self) | {
            "is_hdr": float(self.is_hdr),
            "min_side_px": float(min(self.width_px, self.height_px)),
            "aspect": self.width_px / self.height_px,
        }


def read_facts(path) -> tuple[Facts, np.ndarray]:
    """Facts of the video and its first frame, uint8 RGB, upright. ValueError says why it cannot be used."""
    with _opened(path) as (container, stream):
        frames = _first_frames(stream, container)
        first = frames[0]
        size = _upright(np.empty((first.height, first.width, 0)), first).shape
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError("its header names no frame rate")
        seconds = _duration(container, stream)[0] if len(frames) > 1 else float(1 / rate)
        if not seconds > 0:
            raise ValueError("its duration is not known: it is a bare stream; put it into a container")
        facts = Facts(
            codec=stream.codec_context.name,
            kind="video" if len(frames) > 1 else "image",
            fps=float(rate),
            duration_seconds=seconds,
            width_px=size[1],
            height_px=size[0],
            bit_depth=max(component.bits for component in first.format.components),
            is_hdr=int(first.color_trc) in _HDR_TRANSFERS,
        )
        return facts, shrunk(first, 480)


def decode(path, start_seconds=0.0):
    """Frames from the key frame at or before the start on: (seconds, PyAV frame), seconds from the first.

    ValueError where a packet or frame is damaged, or the file ends before its header says.
    """
    with _opened(path) as (container, stream):
        if start_seconds > 0:
            container.seek((stream.start_time or 0) + int(start_seconds / stream.time_base), stream=stream)
        end = 0.0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError("truncated or corrupt: a packet is damaged")
            for frame in packet.decode():
                seconds = _seconds(frame, stream)
                if frame.is_corrupt and seconds >= start_seconds:  # FFmpeg paints over what it cannot decode
                    raise ValueError("corrupt: a frame is damaged")
                shown = frame.duration * stream.time_base if frame.duration else 0
                end = max(end, seconds + max(float(shown), _frame_seconds(stream)))
                yield seconds, frame
        duration, is_exact = _duration(container, stream)
        if is_exact and end < duration * (1 - _LONGEST_GAP) - _frame_seconds(stream):
            raise ValueError(f"truncated: its header says {duration:.2f} s, its frames end at {end:.2f} s")


def shrunk(frame, side_px, pixels="rgb24") -> np.ndarray:
    """A PyAV frame as uint8 [H, W, 3], or [H, W] for `pixels="gray"`; its shorter side at most `side_px`.

    Upright, so where the file says that its picture lies on its side, it is turned.
    """
    return _resized(frame, min(1.0, side_px / min(frame.width, frame.height)), pixels)


def narrowed(frame, width_px, pixels, is_rough=False) -> np.ndarray:
    """As `shrunk`, with an upright width of at most `width_px`; rough is a fifth faster, with aliasing."""
    width = frame.height if frame.rotation % 180 else frame.width
    return _resized(frame, min(1.0, width_px / width), pixels, "FAST_BILINEAR" if is_rough else "AREA")


def _resized(frame, scale, pixels, interpolation="AREA"):
    width, height = (max(2, round(side * scale)) for side in (frame.width, frame.height))
    scaler = _scaler(frame.width, frame.height, frame.format.name, width, height, pixels, interpolation)
    small = scaler.reformat(frame, width, height, pixels, interpolation=interpolation)
    return np.ascontiguousarray(_upright(small.to_ndarray(), frame))


@functools.lru_cache(maxsize=16)
def _scaler(*of):
    """What makes pictures of one kind from another: its tables cost more than to scale a small frame.

    A frame's own `reformat` builds them anew. Not for two threads at once.
    """
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _upright(image_HW, frame):
    return np.rot90(image_HW, round(frame.rotation / 90))  # both count quarter turns against the clock


def _seconds(frame, stream):
    pts = frame.dts if frame.pts is None else frame.pts
    return max(0.0, float((pts - (stream.start_time or 0)) * stream.time_base))


def _frame_seconds(stream):
    return 1 / float(stream.average_rate or stream.guessed_rate or 25)


class _opened:
    """The container and video stream of a file, as a context; what goes wrong inside becomes a ValueError."""

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self):
        import av

        if not self.path.stat().st_size:
            raise ValueError("the file is empty")
        try:
            self.container = av.open(str(self.path), metadata_errors="replace")
        except av.FFmpegError as error:
            raise ValueError(f"not a video that can be opened ({error.strerror})") from None
        streams = [s for s in self.container.streams.video if not _is_cover(s)]
        if not streams:
            self.container.close()
            raise ValueError("no video stream in it")
        streams[0].codec_context.thread_count = 1  # tasks share the cores out
        return self.container, streams[0]

    def __exit__(self, kind, error, trace):
        import av

        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise ValueError(f"truncated or corrupt ({error.strerror})") from None
        return False


def _is_cover(stream):
    """Whether the stream is the picture on a song's sleeve."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _first_frames(stream, container):
    """The first two frames, or the one there is."""
    frames = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError("truncated or corrupt: its first packets are damaged")
        frames += packet.decode()
        if len(frames) > 1:
            return frames[:2]
    if not frames:
        raise ValueError("no frame of it can be decoded")
    return frames


def _duration(container, stream):
    """Seconds of the video stream, and whether it is the stream's own and not that of a longer sound."""
    import av

    if stream.duration:
        return float(stream.duration * stream.time_base), True
    if text := stream.metadata.get("DURATION"):  # Matroska: 00:01:02.500000000
        hours, minutes, seconds = (float(part) for part in text.split(":"))
        return 3600 * hours + 60 * minutes + seconds, True
    if container.duration:
        return container.duration / 1e6, not container.streams.audio
    # no header has it: the packets do, unless they are a bare stream without times
    try:
        container.seek(0)
    except av.FFmpegError:
        return math.nan, False
    ends = [
        (packet.pts - (stream.start_time or 0)) * stream.time_base
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    return (float(max(ends)) + _frame_seconds(stream) if ends else math.nan), False
