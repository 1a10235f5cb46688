"""The paper's comparisons at toy size, one table: how soon the samples of each run show what is asked for.

    python benchmarks/ablations.py [--demo out/demo] [--output out/ablations] [--only dit] [--write]

Trains the recipes of `recipes/ablations.py` on the latents of a finished `make demo`, images before images
and video, and reads the samples of every checkpoint as `moviegen evaluate checkpoints` does. What is there
already is not made again. --write puts everything into ablations_cpu_2.json here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import recipes
from nemo_moviegen.bench.measure import environment
from nemo_moviegen.evaluation.checkpoints import evaluate_checkpoints
from nemo_moviegen.evaluation.scores import told_share
from nemo_moviegen.flops import train_flops
from nemo_moviegen.generation.generate import Models
from nemo_moviegen.report_charts import read_metrics, series
from nemo_moviegen.sampling import Sampler

RUNS = {
    "paper": "the paper's way",
    "v_prediction": "v-prediction diffusion",
    "dit": "DiT block",
    "no_images": "no images first",
}
"""Names in recipes/ablations.py, and what the table calls them."""
SAMPLERS = {"v_prediction": Sampler(schedule="linear", num_steps=250, batch_size=16)}
"""DDIM's own: even steps, and enough of them."""
_SAMPLER = Sampler(batch_size=16)
NUM_SEEN, NUM_HELDOUT = 96, 48


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="a finished demo (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/ablations"), help="%(default)s")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--write", action="store_true", help="into ablations_cpu_2.json beside this file")
    options = parser.parse_args()
    found = {"environment": environment("megatron-core", "nemo-toolkit"), "runs": {}}
    for name in options.only:
        trained = train(name, options)
        measured = measure(name, options)
        found["runs"][name] = {"title": RUNS[name], **trained, "rows": measured["rows"]}
        print(table(found), flush=True)
    if options.write:
        path = Path(__file__).with_name("ablations_cpu_2.json")
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def stages(name):
    """The recipes of a run in their order: those of images have their names on `_t2i`."""
    images = f"ablations.{name}_t2i"
    return [recipes.get(n) for n in (images, f"ablations.{name}") if n in recipes.RECIPES]


def train(name, options) -> dict:
    """Train what is not there; returns the FLOPs and the seconds of a video step."""
    total, before = 0, ""
    for recipe in stages(name):
        output = options.output / Path(recipe.output).name
        settings = [f"data.folder={options.demo / 'latents'}", f"output={output}", f"init_from={before}"]
        if not (output / "checkpoints" / f"step={recipe.num_steps}").is_dir():
            command = [sys.executable, "-m", "nemo_moviegen", "train", recipe.name, *settings]
            environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            subprocess.run(command, check=True, env=environment)  # its ranks share the cores
        total, before = total + run_flops(recipe), output
    seconds = series(read_metrics(before), "speed/step_seconds")[1]
    return {"train_flops": total, "step_seconds": statistics.median(seconds)}


def run_flops(recipe) -> int:
    """Model FLOPs of a training."""
    every, shape = recipe.data.image_every, (recipe.latent_height, recipe.latent_width)
    images = recipe.num_steps // every if every else 0
    of_image, of_clip = (train_flops(recipe.size, (t, *shape)) for t in (1, recipe.latent_frames))
    clips = recipe.num_steps - images
    return images * recipe.images_per_step * of_image + clips * recipe.global_batch * of_clip


def measure(name, options) -> dict:
    """What `evaluate_checkpoints` finds of the run's averaged weights."""
    models = Models(
        run=options.output / name,
        autoencoder=options.demo / "tae",
        encoders=options.demo / "encoders",
        latents=options.demo / "latents",
        weights="ema",
    )
    sampler, folder = SAMPLERS.get(name, _SAMPLER), options.output / f"{name}_scores"
    return evaluate_checkpoints(models, folder, num_seen=NUM_SEEN, num_heldout=NUM_HELDOUT, sampler=sampler)


def table(found) -> str:
    """Markdown: a row a run, a column a checkpoint, prompts whose every word is right."""
    count = NUM_SEEN + NUM_HELDOUT
    steps = sorted({row["step"] for run in found["runs"].values() for row in run["rows"]})
    lines = ["| run | TFLOP | " + " | ".join(f"step {step:,}" for step in steps) + " |"]
    lines.append("|---|--:|" + "--:|" * len(steps))
    for run in found["runs"].values():
        right = {row["step"]: round(row["score"] * count) for row in run["rows"]}
        cells = [told_share(right[step], count) if step in right else "" for step in steps]
        lines.append(f"| {run['title']} | {run['train_flops'] / 1e12:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
