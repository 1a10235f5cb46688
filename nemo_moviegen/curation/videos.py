"""The videos of a folder: which files they are, and which chunk of the work each belongs to."""

import os
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ogv"),
    *(".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".vob", ".3gp", ".y4m", ".gif"),
)
SIDECARS = (".txt", ".json", ".jsonl", ".csv")
_SIGNS = (b"ftyp", b"\x1a\x45\xdf\xa3", b"AVI ", b"FLV\x01")
"""What MP4, Matroska and WebM, AVI and Flash files have in their first twelve bytes."""


@dataclass(frozen=True)
class Video:
    """One file with a video's ending."""

    name: str
    """Path below the folder, with slashes: what the ids of its clips and all chance are made of."""
    num_bytes: int
    mtime_ns: int


@dataclass
class Listing:
    """What a folder holds."""

    folder: Path
    videos: list[Video] = field(default_factory=list)
    """In order of name."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reason by name: files that should be videos and cannot be taken."""
    ignored: Counter = field(default_factory=Counter)
    """Number of other files by ending."""


def list_videos(folder, output) -> Listing:
    """The videos below `folder`, without what lies below `output`; hidden files and folders are left out.

    Links to folders are not followed. ValueError where there is no folder, or no video in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of videos")
    listing = Listing(folder)
    output = os.path.abspath(output)
    for parent, folders, files in os.walk(folder):
        inside = parent != str(folder)
        if inside and os.path.abspath(parent) == output:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.abspath(parent) == output and "scores" in folders:
            folders.remove("scores")
        stems = {os.path.splitext(name)[0] for name in files if is_video(name)}
        for name in files:
            if not name.startswith("."):
                _add(listing, Path(parent, name), stems)
    listing.videos.sort(key=lambda video: video.name)
    if not listing.videos:
        others = ", ".join(f"{count} {ending}" for ending, count in listing.ignored.most_common(5))
        raise ValueError(
            f"{folder} holds no video" + (f", only other files ({others})" if others else "") + "; "
            f"a video's name ends in one of {' '.join(ENDINGS)}"
        )
    return listing


def is_video(name) -> bool:
    """Whether the file is called like a video."""
    return os.path.splitext(name)[1].lower() in ENDINGS


def chunk_of(name, num_chunks) -> int:
    """Number of the chunk that scores the video: a function of its name alone."""
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_chunks


def _add(listing, path, stems):
    name = path.relative_to(listing.folder).as_posix()
    stem, ending = os.path.splitext(path.name)
    if is_video(path.name):
        try:
            name.encode()
            found = path.stat()
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "backslashreplace").decode()
            listing.refused[shown] = "its name is not UTF-8: rename the file"
        except OSError as error:
            listing.refused[name] = f"cannot be read ({error.strerror})"
        else:
            listing.videos.append(Video(name, found.st_size, found.st_mtime_ns))
    elif ending.lower() in SIDECARS and (stem in stems or stem == "captions"):
        return
    else:
        listing.ignored[ending.lower() or "without ending"] += 1
        if _looks_like_video(path):
            shown = name.encode("utf-8", "backslashreplace").decode()
            listing.refused[shown] = (
                f"is a video, but its name ends in {ending or 'nothing'}: rename the file"
            )


def _looks_like_video(path):
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return any(sign in start for sign in _SIGNS)
