"""From one clip's row to its frames, or to what a decoder needs for them. PyAV only, no DALI.

Output frame k of a clip shows source time start + k / fps: the source frame nearest in time, by the
timestamps in the file, never by counting. Only the clip's own packets are read, from the key frame before its
start, so a one-second clip of a two-hour film costs one second of memory; decoded frames are scaled one by
one and not kept.
"""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_moviegen.data.fit import Fit, draw, fit_of


@dataclass(frozen=True, kw_only=True)
class ReadClip:
    """One clip, read: its pictures, or packets and frame numbers for a decoder that makes them."""

    row: int
    """Index of the clip in the caller's list."""
    fit: Fit
    pictures_TCHW: np.ndarray | None
    """uint16 RGB of the bucket's size, 0 to fit.WHITE."""
    packets: np.ndarray | None
    """uint8: a Matroska file in memory that holds the clip's packets."""
    frames: np.ndarray | None
    """int32 [T]: which frames of `packets`, in order of presentation."""


def read_clip(clip, row, bucket, fps, keeps_packets=False) -> ReadClip:
    """The clip's pictures, `bucket.num_frames` at `fps`, or its packets; an image is one frame.

    ValueError names the clip and its file where the file is missing, empty, no video, truncated, corrupt,
    too short for the bucket, or of colours or an orientation that cannot be shown (see `fit_of`).
    """
    import av

    path = Path(clip.path)
    if not path.is_file():
        raise ValueError(f"clip {clip.clip_id}: {path}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"clip {clip.clip_id}: {path}: the file is empty")
    try:
        with av.open(str(path), options=dict(_open_options())) as container:
            if not container.streams.video:
                raise ValueError("no video stream in it")
            return _read(container, clip, row, bucket, fps, keeps_packets)
    except av.FFmpegError as error:
        raise ValueError(
            f"clip {clip.clip_id}: {path}: cannot be read as a video ({error.strerror})"
        ) from None
    except ValueError as error:
        raise ValueError(f"clip {clip.clip_id}: {path}: {error}") from None


def nearest_frames(times_N, wanted_T) -> np.ndarray:
    """int32 [T]: index of the nearest of the sorted `times_N` to each wanted time, of two the earlier."""
    right = np.searchsorted(times_N, wanted_T).clip(max=len(times_N) - 1)
    left = np.maximum(right - 1, 0)
    # a microsecond decides a tie whatever the rounding of a sum of floats
    is_right = times_N[right] - wanted_T < wanted_T - times_N[left] - 1e-6
    return np.where(is_right, right, left).astype(np.int32)


@functools.cache
def _open_options():
    """What keeps FFmpeg from decoding a key frame at opening, only to learn what the headers say.

    Their pictures are never shown in another order than they are stored, which is what it needs to find out
    of the others. A key frame takes as long as ten frames between; images and short clips gain most.
    """
    import av

    stored_as_shown = {"vp8", "vp9", "av1", "libvpx", "libvpx-vp9", "libdav1d", "libaom-av1"}
    return {"codec_whitelist": ",".join(sorted(av.codecs_available - stored_as_shown))}


def _read(container, clip, row, bucket, fps, keeps_packets):
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # the loader reads several clips at once instead
    wanted_T = clip.start_seconds + np.arange(1 if clip.kind == "image" else bucket.num_frames) / fps
    frame_seconds = 1 / float(stream.average_rate or stream.guessed_rate or fps)
    packets = _packets(container, stream, clip.start_seconds, wanted_T[-1] + frame_seconds)
    origin = stream.start_time or 0
    pts_N = np.array(sorted(_pts(packet) for packet in packets))
    times_N = (pts_N - origin) * float(stream.time_base)
    first, last = _span(clip, times_N, wanted_T, frame_seconds)
    frames_T = nearest_frames(times_N[first:last], wanted_T) + np.int32(first)
    size_px = (bucket.height_px, bucket.width_px)
    if keeps_packets:
        decoded = next(_decode(stream, packets), None)  # one frame: it knows how it is to be shown
        if decoded is None:
            raise ValueError("corrupt: its first frame does not decode")
        fit = fit_of(decoded, stream.sample_aspect_ratio, *size_px)
        kept = _remux(stream, packets)
        return ReadClip(row=row, fit=fit, pictures_TCHW=None, packets=kept, frames=frames_T)
    fit, pictures_TCHW = _draw(stream, packets, pts_N[frames_T].tolist(), size_px)
    return ReadClip(row=row, fit=fit, pictures_TCHW=pictures_TCHW, packets=None, frames=None)


def _packets(container, stream, start_seconds, stop_seconds):
    """Packets from the key frame at or before the start until nothing before the stop can follow."""
    origin = stream.start_time or 0
    if start_seconds > 0:
        container.seek(origin + int(start_seconds / stream.time_base), stream=stream)
    packets, key_pts = [], None
    for packet in container.demux(stream):
        if not packet.size:  # the flush packet at the end
            continue
        if packet.is_corrupt:
            raise ValueError("the file is truncated or corrupt: a packet of the clip is damaged")
        if key_pts is None:
            if not packet.is_keyframe:
                continue
            key_pts = _pts(packet)
        if _pts(packet) >= key_pts:  # leading pictures of an open group refer to frames before the key frame
            packets.append(packet)
        # packets come in decoding order, and no frame is shown before it is decoded
        if (
            (packet.dts if packet.dts is not None else packet.pts) - origin
        ) * stream.time_base > stop_seconds:
            break
    if not packets:
        raise ValueError("holds no frame at the clip's time")
    return packets


def _span(clip, times_N, wanted_T, frame_seconds):
    """Index range of the frames that belong to the clip; ValueError where they end too early."""
    if clip.kind == "image":
        first, last = 0, len(times_N)
    else:
        if wanted_T[-1] >= clip.end_seconds:
            raise ValueError(
                f"the clip of {clip.end_seconds - clip.start_seconds:.3f} s is too short: the bucket's last "
                f"frame is at {wanted_T[-1] - clip.start_seconds:.3f} s; cut longer or take fewer frames"
            )
        slack = 0.01 * frame_seconds  # containers round timestamps, to a millisecond in WebM
        first = int(np.searchsorted(times_N, clip.start_seconds - slack))
        last = int(np.searchsorted(times_N, clip.end_seconds - slack))
    # the last frame stands for one frame's time; 0.9 leaves room for rounded timestamps
    if first >= last or times_N[last - 1] + 0.9 * frame_seconds < wanted_T[-1]:
        end = f"{times_N[last - 1]:.3f} s" if last > first else "before the clip starts"
        raise ValueError(
            f"too short or truncated: its last frame is at {end}, the clip needs {wanted_T[-1]:.3f} s"
        )
    return first, last


def _remux(stream, packets):
    """The packets, undecoded, as a Matroska file in memory."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        copy = out.add_stream_from_template(stream)
        for packet in packets:
            packet.stream = copy
            out.mux(packet)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _draw(stream, packets, pts_T, size_px):
    """Fit, and uint16 [T, C, H, W]: the frames of these timestamps; decodes no further than the last."""
    from av.video.reformatter import VideoReformatter

    places, scaler = {}, VideoReformatter()
    for place, pts in enumerate(pts_T):
        places.setdefault(pts, []).append(place)
    pictures_TCHW = np.empty((len(pts_T), 3, *size_px), np.uint16)
    fit, missing = None, set(places)
    for frame in _decode(stream, packets, missing):
        if _pts(frame) not in missing:
            continue
        fit = fit or fit_of(frame, stream.sample_aspect_ratio, *size_px)
        first, *others = places[_pts(frame)]
        draw(frame, fit, scaler, pictures_TCHW[first])
        pictures_TCHW[others] = pictures_TCHW[first]
        missing.remove(_pts(frame))
        if not missing:
            return fit, pictures_TCHW
    raise ValueError(f"corrupt: {len(missing)} of {len(places)} frames do not decode")


def _decode(stream, packets, wanted=None):
    """The frames of the packets, in order of presentation; some not `wanted` (timestamps) are left out."""
    context = stream.codec_context
    for packet in [*packets, None]:
        if context.name == "h264" and wanted is not None and packet is not None:
            # its header says which frames no other is made from; in VP9 even those leave statistics behind
            context.skip_frame = "DEFAULT" if _pts(packet) in wanted else "NONREF"
        for frame in context.decode(packet):
            if frame.is_corrupt:  # FFmpeg paints over what it cannot decode, and later frames copy from it
                raise ValueError("corrupt: a frame of the clip is damaged")
            yield frame


def _pts(packet):
    return packet.dts if packet.pts is None else packet.pts  # AVI stores no presentation times
