"""Samples from fixed prompts while training: the same in every layout, and training does not notice them."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoencoders import autoencoder, small
from ranks import run_on_ranks

from nemo_moviegen.launch import check_inputs
from nemo_moviegen.recipe import Bucket, ClipData, Layout, Optim, Progress, TaeRecipe, recipe_yaml
from nemo_moviegen.training.autoencoder_weights import CHECKPOINT_FILE
from nemo_moviegen.training.checkpoint import checkpoints
from nemo_moviegen.training.storage import read_whole, tensor_shapes
from nemo_moviegen.validation import heldout_folder
from nemo_moviegen.video_files import read_frames
from parallel.runs import recipe, train_on_ranks, write_latents

SAMPLED = Progress(samples_every=2, num_samples=4, sampling_steps=3, every_seconds=0)
"""Of the held-out samples 0 to 3, the first and the last of which are images."""


pytestmark = pytest.mark.usefixtures("nemo")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(folder)
    write_latents(heldout_folder(folder), num_samples=5, seed=1)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, latents):
    return train(tmp_path_factory.mktemp("one"), latents, num_ranks=1).output


def train(folder, latents, num_ranks, plant=None, **changes):
    """Two steps with large updates, then samples; each rank keeps the latents it made beside them."""
    settings = {
        "optim": Optim(learning_rate=3e-2, warmup_steps=1, clip_grad=1e9),
        "progress": SAMPLED,
        "num_steps": 2,
        "guidance_scale": 3.0,
        **changes,
    }
    run = recipe(folder, latents, **settings)
    train_on_ranks(run, num_ranks, before=lambda: keep_latents(plant))
    return run


def keep_latents(plant):
    from nemo_moviegen.training.samples import Samples

    show = Samples._show

    def show_and_keep(samples, folder, prompt, sample, latent_TCHW):
        show(samples, folder, prompt, sample, latent_TCHW)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(latent_TCHW, folder / f"{prompt.number}-{os.environ['RANK']}.pt")

    Samples._show = show_and_keep
    if plant:
        plant(Samples)


def kept(folder, step=2):
    """{number of the prompt: latent}; each is of one rank alone."""
    files = sorted(Path(folder, "samples", f"step={step}").glob("*.pt"))
    found = {int(file.stem.split("-")[0]): torch.load(file) for file in files}
    assert len(found) == len(files)
    return found


def check_same(folder, expected):
    found = kept(folder)
    assert found.keys() == expected.keys()
    for number, latent in found.items():
        torch.testing.assert_close(latent, expected[number], rtol=0, atol=1e-6, msg=f"prompt {number}")


def lines(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_a_sample_is_the_guided_euler_sample_of_the_weights_of_its_step(one_rank, latents):
    """From the checkpoint of that step, prompt by prompt, with the velocity in whole latents."""
    (expected,) = run_on_ranks(_plain_samples, one_rank, latents, world_size=1)
    check_same(one_rank, expected)
    first, second = expected[1], expected[2]
    assert (first - second).abs().max() > 0.1  # prompts and noise differ


def _plain_samples(run_folder, latents):
    from nemo_moviegen import flow
    from nemo_moviegen.data.latents import LatentReader
    from nemo_moviegen.generation.generate import pad_contexts
    from nemo_moviegen.training.checkpoint import load_video_model

    model, run = load_video_model(run_folder, weights="weights")
    reader = LatentReader(heldout_folder(latents))
    rows = {int(sample_id): row for row, sample_id in enumerate(reader.sample_ids)}
    schedule = flow.linear_quadratic_schedule(3, 250).tolist()
    found = {}
    for number in range(4):
        sample = reader[rows[number]]
        noise = flow.sample_generator(run.seed, number, 0, "fixed prompt noise")
        x = torch.from_numpy(noise.standard_normal(sample.latent_TCHW.shape))[None]
        texts = [pad_contexts([text], run.size.contexts) for text in (sample.contexts, reader.empty_prompt)]
        for t, t_next in itertools.pairwise(schedule):
            time = torch.tensor([t], dtype=torch.float64)
            prompted, unprompted = (model.velocity(x, time, *text) for text in texts)
            x = x + (t_next - t) * (unprompted + 3.0 * (prompted - unprompted))
        found[number] = x[0].float()
    return found


LAYOUTS = {
    "dp2": Layout(sharding="none"),
    "dp2 full, recomputed": Layout(sharding="full", recompute="full"),
    "tp2+sp": Layout(tensor=2, sharding="none"),
    "cp2": Layout(context=2, sharding="optimizer"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_makes_the_samples_of_one_rank(layout, tmp_path, latents, one_rank):
    check_same(train(tmp_path, latents, num_ranks=2, layout=layout).output, kept(one_rank))


def draw_by_rank(samples):
    from nemo_moviegen import flow

    right = flow.draw_noise

    def draw(shape, seed, *rest, purpose="noise", **more):
        seed += int(os.environ["RANK"]) if purpose == "fixed prompt noise" else 0
        return right(shape, seed, *rest, purpose=purpose, **more)

    flow.draw_noise = draw


def forget_to_gather(samples):
    from nemo_moviegen.training import samples as room

    room.gather_tokens = lambda tokens_SBX, config: torch.cat([tokens_SBX, tokens_SBX])


@pytest.mark.parametrize(
    ("bug", "layout"),
    [(draw_by_rank, Layout(sharding="none")), (forget_to_gather, Layout(context=2, sharding="none"))],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_of_layouts_notices_a_bug(bug, layout, tmp_path, latents, one_rank):
    run = train(tmp_path, latents, num_ranks=2, plant=bug, layout=layout)
    with pytest.raises(AssertionError, match="prompt"):
        check_same(run.output, kept(one_rank))


def look_for_gathered_weights(samples):
    right = samples.sample

    def sample_and_look(self, module, folder):
        right(self, module, folder)
        fsdp = module.module.module
        states = {str(status) for status in fsdp.all_gather_pipeline.bucket_status.values()}
        assert states == {"BucketStatus.EMPTY"} and fsdp.is_param_fsdp_distributed

    samples.sample = sample_and_look


def test_training_does_not_notice_bit_for_bit(tmp_path, latents):
    """Losses and everything a checkpoint holds, fully sharded in fp32; no gathered weight stays."""
    changes = {"layout": Layout(sharding="full"), "precision": "fp32", "num_steps": 4, "ema_decay": 0.9}
    runs = [
        train(tmp_path / str(every), latents, 2, plant, progress=progress, **changes)
        for every, progress, plant in (
            (0, Progress(every_seconds=0), None),
            (1, replace(SAMPLED, samples_every=1, every_seconds=1), look_for_gathered_weights),
        )
    ]
    without, with_samples = ([line["train/loss"] for line in lines(run.output)] for run in runs)
    assert without == with_samples
    assert [len(list(Path(run.output).glob("samples/*"))) for run in runs] == [0, 4]
    assert [Path(run.output, "progress.html").is_file() for run in runs] == [False, True]
    first, second = (checkpoints(run.output)[4] / "tensors" for run in runs)
    first, second = (read_whole(folder, tensor_shapes(folder)) for folder in (first, second))
    assert len(first) == len(second) > 4
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def write_autoencoder(folder, **changes):
    """The run folder of a small autoencoder that decodes what the test model makes."""
    size = small(**changes)
    run = TaeRecipe(
        name="tae",
        cluster="cpu_2",
        autoencoder=size,
        data=ClipData(manifest="m", bucket=Bucket(num_frames=8, height_px=64, width_px=32, fps=16.0)),
        optim=Optim(learning_rate=1e-3),
        global_batch=1,
        micro_batch=1,
        num_steps=1,
        output=str(folder),
    )
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe_yaml(run))
    torch.save(
        {"step": 1, "autoencoder": autoencoder(size, fresh=True).state_dict()}, folder / CHECKPOINT_FILE
    )
    return str(folder)


def test_an_autoencoder_makes_clips_and_images_of_them_which_the_page_shows(tmp_path, latents):
    """Two copies decode two prompts each; latents of 3 x 8 x 4 are 24 frames of 64 x 32."""
    progress = replace(SAMPLED, autoencoder=write_autoencoder(tmp_path / "tae"), every_seconds=60)
    run = train(tmp_path / "run", latents, 2, progress=progress, layout=Layout(sharding="none"))
    folder = Path(run.output, "samples", "step=2")
    assert sorted(file.name for file in folder.glob("*.mp4")) == ["001.mp4", "002.mp4"]
    assert read_frames(folder / "001.mp4").shape == (24, 64, 32, 3)
    assert read_frames(folder / "001.png").shape == (1, 64, 8 * 32, 3)
    assert read_frames(folder / "000.png").shape == (1, 64, 32, 3)
    facts = json.loads((folder / "001.json").read_text())
    assert facts == {"prompt": "", "sample_id": 1, "latent_shape": [3, 8, 4], "shows": "frames"}
    page = Path(run.output, "progress.html").read_text()
    assert page.count('alt="step 2: sample') == 4 and 'href="samples/step=2/001.mp4"' in page
    first, second = lines(run.output)
    assert "samples/seconds" in second and "samples/seconds" not in first
    assert second["speed/step_seconds"] < second["samples/seconds"] + first["speed/step_seconds"] + 1


def test_without_an_autoencoder_the_latents_own_channels_are_shown_and_called_that(one_rank):
    folder = Path(one_rank, "samples", "step=2")
    facts = json.loads((folder / "001.json").read_text())
    assert facts["shows"] == "channels 1 to 3 of the latent"
    assert read_frames(folder / "001.png").shape == (1, 8, 3 * 4, 3)
    assert not list(folder.glob("*.mp4")) and not list(folder.glob(".part*"))


def test_a_sample_that_can_not_be_shown_is_said_once_and_training_goes_on(tmp_path, latents, capfd):
    def decode_nonsense(samples):
        samples.frames = lambda self, latent_TCHW: (1, [torch.full((1, 3, 8, 8), torch.nan)])

    run = train(tmp_path, latents, 1, plant=decode_nonsense, progress=replace(SAMPLED, samples_every=1))
    assert [line["step"] for line in lines(run.output)] == [1, 2]
    said = [line for line in capfd.readouterr().out.splitlines() if "no picture" in line]
    reason = "the video holds NaN or infinity: the model that made it has diverged"
    assert said == [f"test: no picture of step=1, prompt 0: {reason}"]


def test_a_page_that_can_not_be_made_is_said_once_and_training_goes_on(tmp_path, latents, capfd):
    def fail(samples):
        from nemo_moviegen.live.page import Page

        def write(self, **settings):
            raise ZeroDivisionError("by 0")

        Page.write = write

    run = train(tmp_path, latents, 1, plant=fail, progress=Progress(every_seconds=1))
    assert [line["step"] for line in lines(run.output)] == [1, 2]
    said = [line for line in capfd.readouterr().out.splitlines() if "no progress page" in line]
    assert said == ["test: no progress page: ZeroDivisionError: by 0"]


def test_what_samples_need_is_checked_before_launch(tmp_path, latents):
    run = recipe(tmp_path, latents, progress=SAMPLED)
    check_inputs(run)
    alone = replace(run.data, folder=str(tmp_path / "alone"))
    write_latents(tmp_path / "alone", num_samples=3)
    with pytest.raises(
        ValueError, match=r"takes the prompts of its samples from .*progress\.samples_every=0"
    ):
        check_inputs(replace(run, data=alone))
    missing = replace(SAMPLED, autoencoder=str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"decodes its samples .* no recipe\.yaml: set progress\.autoencoder"
    ):
        check_inputs(replace(run, progress=missing))


def test_an_autoencoder_of_other_channels_stops_the_run_at_its_start(tmp_path, latents):
    progress = replace(SAMPLED, autoencoder=write_autoencoder(tmp_path / "tae", latent_channels=8))
    with pytest.raises(AssertionError, match=r"latents of 4 channels, the autoencoder in .* takes 8"):
        train(tmp_path / "run", latents, 1, progress=progress)
    assert not Path(tmp_path, "run", "metrics.jsonl").exists() or not lines(tmp_path / "run")


def test_an_autoencoder_takes_no_prompts():
    from recipes import tae

    with pytest.raises(ValueError, match=r"takes no prompts: set progress\.samples_every=0"):
        replace(tae.tiny(), progress=SAMPLED)
