"""Two runs of `chaos` line by line and tensor by tensor, to the last bit."""

import json
from pathlib import Path


def read_metrics(folder) -> list[dict]:
    """Lines of metrics.jsonl without speed and memory; a last one that was being written does not count."""
    path, lines = Path(folder, "metrics.jsonl"), []
    for text in path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []:
        if text.endswith("\n"):
            lines.append({k: v for k, v in json.loads(text).items() if not _is_machines(k)})
    return lines


def _is_machines(name):
    return name.startswith(("speed/", "memory/")) or name.endswith("seconds")


def difference(lines, reference) -> str:
    """The first line that is not the uninterrupted run's, in words; empty where there is none."""
    for number, line in enumerate(lines):
        if line["step"] != number + 1:
            return f"line {number + 1} of metrics.jsonl is of step {line['step']}"
        if number >= len(reference):
            return f"step {line['step']} is past the end of the uninterrupted run"
        for name in sorted(line.keys() | reference[number].keys()):
            mine, theirs = line.get(name), reference[number].get(name)
            if mine != theirs:
                return f"step {line['step']} differs: {name} is {mine!r} instead of {theirs!r}"
    return ""


def checkpoint_difference(folder, reference) -> str:
    """What differs between the last checkpoints of two runs, in words; empty where nothing does."""
    import torch

    from nemo_moviegen.training.checkpoint import last_checkpoint, read_state
    from nemo_moviegen.training.storage import check_files, read_whole, tensor_shapes

    states, tensors = [], []
    for run in (folder, reference):
        last = last_checkpoint(run)
        check_files(last / "tensors")
        states.append(read_state(last))
        tensors.append(read_whole(last / "tensors", sorted(tensor_shapes(last / "tensors"))))
    if states[0] != states[1]:
        return f"state.json of the last checkpoint says {states[0]} instead of {states[1]}"
    if tensors[0].keys() != tensors[1].keys():
        return f"the last checkpoint has other tensors: {sorted(tensors[0].keys() ^ tensors[1].keys())}"
    for name, tensor in tensors[0].items():
        if not torch.equal(tensor, tensors[1][name]):
            off = (tensor != tensors[1][name]).sum().item()
            return f"{name} of the last checkpoint differs in {off} of {tensor.numel()} elements"
    return ""
