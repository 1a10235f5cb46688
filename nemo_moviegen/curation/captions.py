"""What a video shows, from the files beside it: name.json, name.txt, or captions.jsonl / .csv of a folder."""

import csv
import io
import json
import os
import posixpath
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

FIELDS = ("caption", "image_caption", "split", "attributes", "source")
TABLES = ("captions.jsonl", "captions.csv")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What is said of a video; empty where nothing is."""

    caption: str = ""
    image_caption: str = ""
    """Of one frame, where it differs."""
    split: str = ""
    """train or heldout."""
    attributes: str = ""
    """JSON."""
    source: str = ""


def caption_reader(folder):
    """The function that returns the `Caption` of a video by name; ValueError naming the file at fault.

    name.json (the keys are those of `Caption`) and name.txt (the caption alone) lie beside the video; a
    captions.jsonl or captions.csv, with `file` relative to its own folder and the same keys, may lie there or
    in any folder above, up to `folder`. The first that names the video counts. All files are UTF-8. Without a
    source of its own a video has that of the first folder on its way.
    """
    folder = str(folder)

    @cache
    def table(parent):
        found, problems = {}, []
        for name in TABLES:
            path = os.path.join(folder, parent, name)
            if os.path.isfile(path):
                rows, wrong = _rows(path)
                found |= {key: (path, row) for key, row in rows.items()}
                problems += wrong
        return found, problems

    def read(name) -> Caption:
        caption = _beside(os.path.join(folder, os.path.splitext(name)[0]))
        parts, problems = name.split("/"), []
        for depth in range(len(parts) - 1, -1, -1):
            if caption.caption:
                break
            rows, wrong = table("/".join(parts[:depth]))
            problems += wrong[:1]
            if row := rows.get("/".join(parts[depth:])):
                caption = replace(_caption(*row), **{k: v for k, v in vars(caption).items() if v})
        if not caption.caption and problems:  # the line that cannot be read may be this video's
            raise ValueError(f"no caption; {problems[0]}")
        first, separator, _ = name.partition("/")
        return replace(caption, source=caption.source or (first if separator else ""))

    return read


def _beside(stem):
    """What the sidecars say of the video of this path without its ending."""
    path, caption = f"{stem}.json", Caption()
    if os.path.isfile(path):
        try:
            values = json.loads(_text(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error})") from None
        caption = _caption(path, values)
    path = f"{stem}.txt"
    if not caption.caption and os.path.isfile(path):
        caption = replace(caption, caption=" ".join(_text(path).split()))
    return caption


def _rows(path):
    """Values by `file`, and what is wrong with lines that cannot be used: they take no other with them."""
    # bytes that are no UTF-8 stay with their row, which `_caption` refuses
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    found, problems = {}, []
    for number, row in enumerate(_csv(text) if path.endswith(".csv") else text.splitlines(), 1):
        try:
            if isinstance(row, str):
                if not row.strip():
                    continue
                row = json.loads(row)
            found[posixpath.normpath(row["file"])] = row
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number} is not JSON ({error})")
        except (KeyError, TypeError):
            problems.append(f"{path}, row {number} names no `file`, a path relative to its folder")
    return found, problems


def _csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def _caption(path, values) -> Caption:
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object with a caption")
    found = {name: values[name] for name in FIELDS if values.get(name) not in (None, "")}
    if not isinstance(found.get("attributes", ""), str):
        found["attributes"] = json.dumps(found["attributes"])
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name} is {value!r}; it needs a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: {name} {value!a} is not UTF-8; write it as UTF-8") from None
    if found.get("split", "train") not in ("train", "heldout"):
        raise ValueError(f"{path}: split is {found['split']!r}; use train or heldout")
    for name in ("caption", "image_caption"):
        found[name] = " ".join(found.get(name, "").split())
    return Caption(**found)


def _text(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); write it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
