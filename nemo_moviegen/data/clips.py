"""Clips and their manifest: which seconds of which file are a training sample, and what they show (s3.2.1).

A manifest is a Parquet table, one row a clip. Cutting a video adds rows; it never re-encodes.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

logger = logging.getLogger(__name__)

BIG_BUCK_BUNNY = Path(__file__).parent / "assets" / "bigbuckbunny.mp4"
"""Five seconds of real video (H.264, 1280x720, 25 fps); see ATTRIBUTION beside it."""
BIG_BUCK_BUNNY_CAPTION = "a big gray cartoon rabbit at its burrow on a green meadow"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One training sample before decoding: a span of a video file, or one frame of it."""

    clip_id: str
    """Unique in a data set; `sample_id` of it keys the sample's randomness."""
    path: str
    """Video file; absolute once read from a manifest."""
    kind: str
    """video or image."""
    start_seconds: float
    end_seconds: float
    """Exclusive end of the span; equal to the start for an image."""
    source_fps: float
    width_px: int
    height_px: int
    codec: str
    """FFmpeg's name: vp9, h264, ..."""
    caption: str
    split: str = "train"
    """train or heldout."""
    attributes: str = ""
    """JSON of what is known about the clip, empty where nothing is."""

    def __post_init__(self):
        if self.kind not in ("video", "image"):
            raise ValueError(f"clip {self.clip_id}: kind is {self.kind!r}; use video or image")
        if self.split not in ("train", "heldout"):
            raise ValueError(f"clip {self.clip_id}: split is {self.split!r}; use train or heldout")
        span = (self.start_seconds, self.end_seconds)
        if self.start_seconds < 0 or (self.kind == "image") != (span[0] == span[1]) or span[1] < span[0]:
            raise ValueError(
                f"clip {self.clip_id}: seconds {span[0]}..{span[1]} are no {self.kind}: "
                "a video ends after it starts, an image ends where it starts"
            )


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file's header says."""

    codec: str
    width_px: int
    height_px: int
    fps: float
    duration_seconds: float


def sample_id(clip_id) -> int:
    """63-bit hash of the clip's id, the same on every machine and in any row order."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big") >> 1


def write_manifest(path, clips) -> Path:
    """Manifest at `path` with a row for each clip, in order; files below its folder are named relative to it.

    Written beside and renamed: a killed writer leaves the old manifest. ValueError if two clips share an id.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    _check_unique(path, clips)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(replace(clip, path=_relative(clip.path, path.parent))) for clip in clips]
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), part)
    os.replace(part, path)
    return path


def read_manifest(path) -> list[Clip]:
    """Clips of the manifest in row order, paths absolute. ValueError says what is wrong with the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no clip manifest at {path}; write one with `moviegen shapes` or `moviegen cut`")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet manifest: {error}") from None
    missing = [name for name in _schema().names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"manifest {path} lacks the columns {', '.join(missing)}; write it again with `write_manifest`"
        )
    rows = table.select(_schema().names).to_pylist()
    for row in rows:
        row["path"] = str((path.parent / row["path"]).resolve())
    clips = [Clip(**row) for row in rows]
    _check_unique(path, clips)
    return clips


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


def record_unusable(quarantine, clip_id, path, reason):
    """Log a warning; append clip_id, path and reason as JSON to the file `quarantine`, if there is one."""
    logger.warning("left out: %s", reason)
    if quarantine:
        quarantine = Path(quarantine)
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"clip_id": clip_id, "path": str(path), "reason": reason})
        with quarantine.open("a") as file:  # one short append: ranks may share the file
            file.write(line + "\n")


def _schema():
    import pyarrow as pa

    types = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    return pa.schema([(field.name, types[field.type]) for field in fields(Clip)])


def _check_unique(path, clips):
    seen = set()
    for clip in clips:
        if clip.clip_id in seen:
            raise ValueError(
                f"manifest {path}: two clips are called {clip.clip_id!r}; give each its own clip_id"
            )
        seen.add(clip.clip_id)


def _relative(path, folder):
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
