"""The page on which people vote, blind, between the samples of two models; it links their videos."""

import json
import os
from pathlib import Path

from nemo_moviegen.evaluation.votes import AXES, TIE
from nemo_moviegen.generation.files import read_samples
from nemo_moviegen.pages import render


def write_compare(folders, names, path, *, axes=("text", "quality"), limit=0) -> tuple[Path, int]:
    """Write the page about samples of `folders`, two that `generate` filled from the same prompts.

    Returns its path and the number of pairs. Videos are linked relative to the page, so it can be moved with
    them. `limit` takes the first prompts only (0 = all). ValueError where a folder has no samples, the
    prompts differ, or names or axes do not serve.
    """
    if len(folders) != 2 or len(set(names)) != 2 or TIE in names:
        raise ValueError(f"models {', '.join(names)}: compare two, of different names, none of them `{TIE}`")
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(f"there is no axis {', '.join(unknown)}; use {', '.join(AXES)}")
    samples = [read_samples(folder) for folder in folders]
    prompts = [{number: prompt for number, (prompt, _) in of.items()} for of in samples]
    if prompts[0] != prompts[1]:
        raise ValueError(
            f"{folders[0]} and {folders[1]} hold samples of different prompts: run `moviegen generate` of "
            "both models on one prompts file"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [
        {"number": number, "prompt": prompt, "files": [_linked(of[number][1], path.parent) for of in samples]}
        for number, prompt in sorted(prompts[0].items())
    ]
    pairs = pairs[: limit or None]
    data = {"models": list(names), "axes": {axis: AXES[axis] for axis in axes}, "pairs": pairs}
    # < and > as escapes: a prompt that says </script> would end the script
    text = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e")
    path.write_text(render("compare.html.j2", data=text), encoding="utf-8")
    return path, len(pairs)


def _linked(file, folder):
    return Path(os.path.relpath(file, folder)).as_posix()
