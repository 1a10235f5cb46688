"""A run of v-prediction trains, measures and samples by it: its first losses are the mean square of v."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_moviegen import diffusion, flow
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.progress import Progress
from nemo_moviegen.recipe import Optim
from nemo_moviegen.validation import Validation, heldout_folder
from parallel.runs import recipe, train_on_ranks, write_latents

pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(folder)
    write_latents(heldout_folder(folder), num_samples=6, seed=1)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latents):
    """{objective: folder}: a step on all clips from weights whose output is 0, and too small to change it."""
    made = {}
    for objective in ("v_prediction", "flow_matching"):
        run = recipe(
            tmp_path_factory.mktemp(objective),
            latents,
            objective=objective,
            data=replace(recipe("", latents).data, image_every=0),
            optim=Optim(learning_rate=1e-30, clip_grad=1e9),
            global_batch=16,
            num_steps=1,
            validation=Validation(every=1, times_per_sample=1),
            progress=Progress(samples_every=1, num_samples=1, sampling_steps=2),
        )
        train_on_ranks(run, 1)
        made[objective] = run.output
    return made


def clips_of(folder):
    """(id, normalised latent) of every clip, by id."""
    reader = LatentReader(folder)
    mean, std = (torch.as_tensor(numbers).view(1, -1, 1, 1) for numbers in reader.statistics)
    samples = [reader[row] for row in range(len(reader)) if reader.latent_shapes[row][0] > 1]
    found = [(s.sample_id, (torch.as_tensor(s.latent_TCHW).double() - mean) / std) for s in samples]
    return sorted(found, key=lambda pair: pair[0])


def squares(data, noise, t, objective):
    """Mean square of what is learnt of one clip."""
    if objective == "flow_matching":
        return float((data - (1 - 1e-5) * noise).square().mean())
    share = float(diffusion.signal(torch.tensor(t)))
    return float((share * noise - (1 - share**2) ** 0.5 * data).square().mean())


def drawn(seed, sample_id, shape, purpose):
    return torch.from_numpy(flow.sample_generator(seed, sample_id, 0, purpose).standard_normal(shape))


def lines(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
def test_the_first_loss_is_the_mean_square_of_what_is_learnt(objective, runs, latents):
    expected = []
    for sample_id, data in clips_of(latents):
        t = float(flow.sample_generator(0, sample_id, 0, "time").random())  # even times; flow's drop out
        expected.append(squares(data, drawn(0, sample_id, data.shape, "noise"), t, objective))
    assert len(expected) == 16
    assert lines(runs[objective])[0]["train/loss"] == pytest.approx(sum(expected) / 16, rel=1e-6)


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
def test_the_validation_loss_is_of_the_same_objective(objective, runs, latents):
    expected = []
    for place, (sample_id, data) in enumerate(clips_of(heldout_folder(latents))):
        t = (place % 8 + flow.sample_generator(0, sample_id, 0, "validation time").random()) / 8
        expected.append(squares(data, drawn(0, sample_id, data.shape, "validation noise"), t, objective))
    told = {key: value for line in lines(runs[objective]) for key, value in line.items()}
    assert told["validation/loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_samples_while_training_are_made_as_the_model_is_trained(runs):
    """Of velocity 0 Euler leaves the noise as it is, and DDIM takes its share of it."""
    shown = [Path(folder, "samples", "step=1", "000.png").read_bytes() for folder in runs.values()]
    assert shown[0] != shown[1]
