"""What a checkpoint costs at the demo's size: saving, loading, and the steps that go on meanwhile.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--write]

Two forked gloo ranks train tiny.t2iv on random latents. Rounds of ten steps alternate: with a checkpoint at
their start (written in the background) and without. --write puts the raw numbers into checkpoints.json here.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from parallel.runs import train_on_ranks  # noqa: E402

from nemo_moviegen.data.random_latents import write_random_latents  # noqa: E402
from nemo_moviegen.recipe import Layout  # noqa: E402
from nemo_moviegen.training.cpu import stand_in_for_cuda  # noqa: E402
from recipes import tiny  # noqa: E402

ROUND, ROUNDS, WARM_UP = 10, 24, 20


def main():
    stand_in_for_cuda()
    import nemo.lightning  # noqa: F401, before the ranks fork

    import nemo_moviegen.training.module  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        rng, size = np.random.default_rng(0), tiny.t2iv().size
        write_random_latents(Path(folder, "latents"), size, 96, rng, shapes=[(2, 8, 8)], num_tokens=8)
        found = {s: _measure(Path(folder), s) for s in ("none", "optimizer", "full")}
    for sharding, values in found.items():
        print(sharding, json.dumps(values["summary"]))
    if "--write" in sys.argv:
        facts = {"machine": platform.processor() or platform.machine(), "ranks": 2, "recipe": "tiny.t2iv"}
        path = Path(__file__).with_suffix(".json")
        path.write_text(json.dumps({**facts, "sharding": found}, indent=1) + "\n", encoding="utf-8")


def _measure(folder, sharding):
    run = replace(
        tiny.t2iv(),
        data=replace(tiny.t2iv().data, folder=str(folder / "latents"), image_every=0),
        layout=Layout(sharding=sharding),
        init_from="",
        ema_decay=0.999,
        num_steps=WARM_UP + ROUND * ROUNDS,
        save_every=10**9,
        validation=replace(tiny.t2iv().validation, every=0),
        output=str(folder / sharding),
    )
    train_on_ranks(run, 2, before=_time_checkpoints)
    times = json.loads((folder / sharding / "times.json").read_text())
    resumed = replace(run, num_steps=run.num_steps + 1)
    train_on_ranks(resumed, 2, before=_time_checkpoints)
    times |= {"load_s": json.loads((folder / sharding / "times.json").read_text())["load_s"]}
    lines = [json.loads(line) for line in (folder / sharding / "metrics.jsonl").read_text().splitlines()]
    steps = [line["speed/step_seconds"] for line in lines][WARM_UP : WARM_UP + ROUND * ROUNDS]
    rounds = [sum(steps[i : i + ROUND]) for i in range(0, len(steps), ROUND)]
    # each saving round against the mean of its two neighbours: drift of the machine cancels
    extra = [
        rounds[i] + times["blocked_s"][i // 2] - (rounds[i - 1] + rounds[i + 1]) / 2
        for i in range(2, len(rounds) - 1, 2)
    ]
    step = statistics.median(steps)
    summary = {
        "step_ms": 1e3 * step,
        "blocked_ms": 1e3 * statistics.median(times["blocked_s"]),
        "written_after_ms": 1e3 * statistics.median(times["written_s"]),
        "save_costs_ms": 1e3 * statistics.median(extra),
        "save_costs_share_of_interval": statistics.median(extra) / (step * tiny.t2iv().save_every),
        "load_ms": 1e3 * max(times["load_s"]),
        "megabytes_a_rank": times["megabytes"],
    }
    return {"summary": summary, "rounds_s": rounds, **times, "layout": asdict(run.layout)}


def _time_checkpoints():
    """In a rank: save at the start of every other round, and note what takes how long."""
    from nemo_moviegen.training import saving

    times = {"blocked_s": [], "written_s": [], "load_s": [], "megabytes": 0}
    after_step, write, read = (
        saving.Checkpoints.on_train_batch_end,
        saving.write_folder,
        saving.Checkpoints.read,
    )

    def on_train_batch_end(self, trainer, *args):
        after_step(self, trainer, *args)
        step = trainer.global_step - WARM_UP
        if step >= 0 and step % (2 * ROUND) == 0 and step < ROUND * ROUNDS:
            started = time.perf_counter()
            self.save(trainer.global_step)
            times["blocked_s"].append(time.perf_counter() - started)
            times["megabytes"] = sum(b.nbytes for b in self.writer.buffers.values()) / 1e6

    def timed_write(*args):
        started = time.perf_counter()
        write(*args)
        times["written_s"].append(time.perf_counter() - started)

    def timed_read(self, folder):
        started = time.perf_counter()
        told = read(self, folder)
        times["load_s"].append(time.perf_counter() - started)
        return told

    def on_train_end(self, trainer, module):
        self.writer.wait()
        if trainer.is_global_zero:
            self.save(trainer.global_step) if self.saved_step != trainer.global_step else None
            Path(self.recipe.output, "times.json").write_text(json.dumps(times))
        elif self.saved_step != trainer.global_step:
            self.save(trainer.global_step)
        self.writer.wait()

    saving.Checkpoints.on_train_batch_end, saving.write_folder = on_train_batch_end, timed_write
    saving.Checkpoints.read, saving.Checkpoints.on_train_end = timed_read, on_train_end


if __name__ == "__main__":
    main()
