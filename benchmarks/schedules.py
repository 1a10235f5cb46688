"""The few steps of the linear-quadratic schedule beside many even ones (s3.4), on a trained model.

    python benchmarks/schedules.py [--demo out/demo] [--output out/schedules] [--write]

Two tables in one: how many prompts of Moving Shapes the videos of each schedule follow, and how far its
latents end from those of 1,000 even steps that start from the same noise. The second is the error of the mean
velocity, since what a schedule integrates is data minus noise: the root of the squared error over all numbers
of the latents, relative to that of the velocity. --write puts everything into schedules_cpu_2.json here.
"""

import argparse
import json
from pathlib import Path

import torch

from nemo_moviegen.bench.measure import environment
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.synthetic import caption, draw_spec
from nemo_moviegen.evaluation.scores import told_share
from nemo_moviegen.evaluation.shapes import JOINT, WORDS, evaluate_shapes
from nemo_moviegen.flow import draw_noise
from nemo_moviegen.generation.generate import Models, sample_batches
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.sampling import Sampler
from nemo_moviegen.text_encoders import TextEncoders
from nemo_moviegen.training.checkpoint import load_video_model

SAMPLERS = {
    "linear-quadratic 50": Sampler(batch_size=16),
    "linear 50": Sampler(schedule="linear", batch_size=16),
    "linear 250": Sampler(schedule="linear", num_steps=250, batch_size=16),
    "linear 500": Sampler(schedule="linear", num_steps=500, batch_size=16),
}
REFERENCE = Sampler(schedule="linear", num_steps=1000, batch_size=16)
NUM_SEEN, NUM_HELDOUT, NUM_LATENTS = 96, 48, 48
FPS = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="a finished demo (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/schedules"), help="%(default)s")
    parser.add_argument("--write", action="store_true", help="into schedules_cpu_2.json beside this file")
    options = parser.parse_args()
    parts = {name: options.demo / name for name in ("encoders", "latents")}
    models = Models(run=options.demo / "t2iv", autoencoder=options.demo / "tae", **parts)
    rows = velocity_errors(models)
    for name, sampler in SAMPLERS.items():
        folder = options.output / name.replace(" ", "-")
        scores = evaluate_shapes(models, folder, num_seen=NUM_SEEN, num_heldout=NUM_HELDOUT, sampler=sampler)
        judged = [sample["right"] for sample in scores["samples"]]
        rows[name] |= {word: sum(right[word] for right in judged) for word in (JOINT, WORDS)}
        rows[name]["of"] = len(judged)
    print(table(rows))
    if options.write:
        found = {"environment": environment("megatron-core"), "rows": rows}
        path = Path(__file__).with_name("schedules_cpu_2.json")
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def velocity_errors(models) -> dict:
    """{schedule: {"velocity_error": ...}}: its mean velocities less those of the reference, relative."""
    model, recipe = load_video_model(models.run, weights="ema")
    specs = [draw_spec(0, index, "train" if index % 3 else "heldout") for index in range(NUM_LATENTS)]
    prompts = [with_fps(caption(spec), FPS) for spec in specs]
    features = dict(enumerate(TextEncoders.load(models.encoders, recipe.size.contexts).encode(prompts)))
    empty = LatentReader(models.latents).empty_prompt
    shape = (recipe.latent_frames, recipe.size.output_channels, recipe.latent_height, recipe.latent_width)
    noise = draw_noise(shape, 0, range(NUM_LATENTS), [0] * NUM_LATENTS)

    def mean_velocity(sampler):
        sampler = Sampler(**vars(sampler) | {"guidance_scale": recipe.guidance_scale})
        sizes = recipe.size.contexts
        batches = sample_batches(model, features, empty, sizes, shape, sampler=sampler)
        return torch.cat([latent_BTCHW for _, latent_BTCHW in batches]) - noise

    truth = mean_velocity(REFERENCE)
    scale = truth.square().mean().sqrt()
    return {
        name: {"velocity_error": float((mean_velocity(sampler) - truth).square().mean().sqrt() / scale)}
        for name, sampler in SAMPLERS.items()
    }


def table(rows) -> str:
    """Markdown: a row a schedule."""
    lines = ["| schedule, steps | velocity error | color and direction | every word |", "|---|--:|--:|--:|"]
    for name, row in rows.items():
        cells = [f"{row['velocity_error']:.1%}", *(told_share(row[w], row["of"]) for w in (JOINT, WORDS))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
