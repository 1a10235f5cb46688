"""From prompts to files, through the real models, on one rank, by tasks and on two ranks."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from nemo_moviegen.generation import files
from nemo_moviegen.generation.generate import Models, generate, sample_batches
from nemo_moviegen.generation.rewrite import rules
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.layout import Layout
from nemo_moviegen.recipe import recipe_yaml
from nemo_moviegen.sampling import Sampler, keeping
from nemo_moviegen.sizes import VIDEO_TINY, AutoencoderSize
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.tae.tiling import Tiling
from nemo_moviegen.video_files import read_frames
from recipes import tae, tiny


def test_a_video_becomes_an_mp4_and_an_image_a_png(tmp_path):
    names = [files.sample_file(tmp_path, 0, 'A red "circle"!', 5), files.sample_file(tmp_path, 1, "//", 1)]
    assert [path.name for path in names] == ["000-a-red-circle.mp4", "001-sample.png"]
    files.write_sample([torch.zeros(3, 3, 16, 16), torch.zeros(2, 3, 16, 16)], names[0], 8)
    files.write_sample([torch.zeros(1, 3, 16, 16)], names[1], 8)
    assert [len(read_frames(path)) for path in names] == [5, 1]
    assert not list(tmp_path.glob(".*")), "nothing half written"
    assert files.write_sheet(tmp_path / "sheet.png", names, ["a" * 10_000, "\U0001f680"]).stat().st_size > 500


@pytest.mark.parametrize(
    "prompt", ["\U0001f680\U0001f680", "\u732b\u304c\u6b69\u304f", "a/../b", "x" * 10_000, "caf\u00e9"]
)
def test_any_prompt_names_a_file_in_its_folder(tmp_path, prompt):
    path = files.sample_file(tmp_path, 7, prompt, 16)
    assert path.parent == tmp_path and path.name.startswith("007-") and len(path.name) < 70
    assert files.write_sample([torch.zeros(2, 3, 16, 16)], path, 23.976).is_file()


def test_the_sheet_keeps_the_frames_it_shows_and_no_others():
    """Seen to catch: numbers counted from the chunk's start."""
    chunks = torch.arange(20.0).split(3)
    kept = []
    assert torch.equal(torch.cat(list(keeping(chunks, [0, 4, 5, 19], kept))), torch.arange(20.0))
    assert [float(frame) for frame in kept] == [0, 4, 5, 19]


PROMPTS = ["a red circle moves left slowly", "a blue square", 'a sign reads "hello"']
RECIPE = replace(tiny.t2iv(), size=replace(VIDEO_TINY, num_layers=1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What `generate` reads: a run and an autoencoder (recipes only), text encoders and latents."""
    from nemo_moviegen.data.latent_writer import LatentWriter, write_empty_prompt
    from nemo_moviegen.data.latents import LatentSample
    from nemo_moviegen.text_encoders import TextEncoders, write_toy_encoders

    found = {name: tmp_path_factory.mktemp(name) for name in ("run", "tae", "encoders", "latents")}
    for name, recipe in (("run", RECIPE), ("tae", tae.tiny())):
        (found[name] / "recipe.yaml").write_text(recipe_yaml(recipe))
    write_toy_encoders(found["encoders"], RECIPE.size.contexts)
    empty = TextEncoders.load(found["encoders"], RECIPE.size.contexts).encode([""])[0]
    latent = 2 * np.random.default_rng(0).standard_normal((2, 16, 8, 8)) + 1
    sample = LatentSample(sample_id=1, clip_id="a", caption="a", fps=16, latent_TCHW=latent, contexts=empty)
    with LatentWriter(found["latents"]) as writer:
        write_empty_prompt(found["latents"], empty)
        writer.add(sample)
    return found


def asked(folders, **changed):
    """Arguments of a small `generate` on those folders, but for prompts and output; some changed."""
    settings = {"num_frames": 11, "height_px": 32, "width_px": 48, "fps": 16, "num_steps": 4, **changed}
    bucket = {name: settings.pop(name) for name in ("num_frames", "height_px", "width_px", "fps")}
    models = {"run": "run", "autoencoder": "tae", "encoders": "encoders", "latents": "latents"}
    models = {name: settings.pop(name, folders[folder]) for name, folder in models.items()}
    more = {name: settings.pop(name) for name in ("task", "layout", "rewrite", "tiling") if name in settings}
    return {"models": Models(**models), "bucket": Bucket(**bucket), "sampler": Sampler(**settings), **more}


def make(folders, output, prompts, **changed):
    """(frames of each sample, settings)."""
    made = generate(prompts=prompts, output=output, **asked(folders, **changed))
    if not made:
        return None
    written = json.loads((output / "settings.json").read_text())
    names = [sample["file"] for sample in written["samples"]]
    assert [file.name for file in made] == [*names, "contact_sheet.png", "settings.json"]
    return [read_frames(output / name).astype(int) for name in names], written


def stand_ins(layout):
    """In a process of its own, for it patches what loads models: real ones, the same in any layout."""
    import nemo_moviegen.training.autoencoder_weights
    import nemo_moviegen.training.checkpoint
    from nemo_moviegen.training.cpu import stand_in_for_cuda

    stand_in_for_cuda()
    nemo_moviegen.training.checkpoint.join_process_groups(layout)
    from nemo_moviegen.video.model import VideoTransformer, video_config

    model = VideoTransformer(video_config(RECIPE.size, layout, "fp32")).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in (model.head.weight, model.modulation.linear.weight):
        # both start at zero, and every prompt would look the same
        torch.nn.init.normal_(weight, std=0.05, generator=generator)
    torch.manual_seed(0)
    size = AutoencoderSize(base_width=8, multipliers=(1, 1, 2, 2), blocks_per_level=1)
    autoencoder = TemporalAutoencoder(size).eval()
    nemo_moviegen.training.checkpoint.load_video_model = lambda *_, **__: (model, RECIPE)
    nemo_moviegen.training.autoencoder_weights.load_autoencoder = lambda folder: autoencoder


def make_on_rank(folders, output):
    stand_ins(Layout())
    image = {"num_frames": 1}
    return {
        "all": make(folders, output / "all", PROMPTS, batch_size=2),
        "first": make(folders, output / "first", PROMPTS[:1], batch_size=1),
        "weak": make(folders, output / "weak", PROMPTS[:1], guidance_scale=1.0, **image),
        "strong": make(folders, output / "strong", PROMPTS[:1], guidance_scale=8.0, **image),
        "empty": make(folders, output / "empty", PROMPTS[:1], guidance_scale=0.0, **image),
        "away": make(
            folders,
            output / "away",
            PROMPTS[1:2],
            negative_prompt=PROMPTS[0],
            guidance_scale=0.0,
            **image,
        ),
        "tasks": make_by_tasks(folders, output / "tasks"),
        "empty other": make(folders, output / "other", PROMPTS[1:2], guidance_scale=0.0, **image),
        "long": make(folders, output / "long", ["word " * 2000, "\U0001f680 caf\u00e9"], **image),
        "rewritten": make(folders, output / "rules", ["a video of a cat, 4k"], rewrite=rules, **image),
    }


def make_by_tasks(folders, output):
    """Frames of each sample, made by two tasks; what a third try of one made; what others are told."""

    def run(index, prompts=PROMPTS, **changed):
        return generate(prompts=prompts, output=output, **asked(folders, task=(index, 2), **changed))

    made = sorted(file for index in (1, 0) for file in run(index) if file.suffix == ".mp4")
    told = []
    changes = ({"seed": 1}, {"method": "midpoint"}, {"negative_prompt": "fog"}, {"prompts": PROMPTS[::-1]})
    changes += ({"tiling": Tiling(frames=0)},)
    for changed in changes:
        with pytest.raises(ValueError) as error:
            run(0, **changed)
        told.append(str(error.value))
    before = [file.stat().st_mtime_ns for file in made]
    made[0].unlink()
    run(0)
    again = [file.stat().st_mtime_ns for file in made]
    run(1)
    return [read_frames(file).astype(int) for file in made], before, again, told


def make_in_layout(folders, output, layout):
    """Latents that the ranks of a layout make, and the frames of a whole `generate`."""
    stand_ins(layout)
    from nemo_moviegen.training.checkpoint import load_video_model

    sizes = RECIPE.size.contexts
    rows = {
        number: {c.name: np.full((3, c.width), 0.3 * number, np.float32) for c in sizes}
        for number in range(3)
    }
    model, _ = load_video_model()
    sampler = Sampler(num_steps=10, batch_size=2, guidance_scale=3.0)
    batches = sample_batches(model, rows, rows[0], sizes, (2, 16, 4, 6), sampler=sampler, shows=False)
    latents = torch.cat([latent_BTCHW for _, latent_BTCHW in batches])
    time.sleep(3 * torch.distributed.get_rank())  # who comes late finds samples of this very call
    return latents, make(folders, output, PROMPTS, layout=layout)


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """Samples by what they were asked for."""
    return run_on_ranks(make_on_rank, folders, tmp_path_factory.mktemp("out"), world_size=1)[0]


def test_prompts_become_videos_through_the_real_models(made):
    videos, settings = made["all"]
    assert [sample["prompt"] for sample in settings["samples"]] == PROMPTS
    assert [video.shape for video in videos] == [(11, 32, 48, 3)] * 3
    assert settings["guidance_scale"] == RECIPE.guidance_scale
    assert abs(videos[0] - videos[1]).mean() > 1
    (alone,), _ = made["first"]
    assert abs(alone - videos[0]).max() <= 2, "a sample does not depend on its batch"


def test_tasks_of_an_array_make_the_samples_of_one_and_only_what_is_missing(made):
    frames, before, again, told = made["tasks"]
    assert len(frames) == len(PROMPTS)
    for by_task, whole in zip(frames, made["all"][0], strict=True):
        assert abs(by_task - whole).max() <= 2
    assert again[0] > before[0] and again[1:] == before[1:], "only what was gone is made"
    names = ("seed", "schedule", "negative prompt", "prompts", "tiling")
    for text, words in zip(told, names, strict=True):
        assert f"holds samples of another {words} (settings-" in text


def test_long_and_foreign_prompts_are_made_and_what_was_cut_is_told(made):
    images, settings = made["long"]
    assert len(images) == 2
    assert settings["num_cut"]["ul2"] == 1 and settings["num_cut"]["metaclip"] == 1


def test_the_settings_have_the_prompt_and_what_it_was_rewritten_to(made):
    _, settings = made["rewritten"]
    (sample,) = settings["samples"]
    assert (sample["prompt"], sample["rewritten"]) == ("a video of a cat, 4k", "a cat")
    assert settings["rewrite"] == "rules" and made["all"][1]["rewrite"] == ""


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(context=2), Layout()], ids=["tensor", "context", "copies"]
)
def test_two_ranks_make_what_one_makes(folders, tmp_path, made, layout):
    """Seen to catch: prompts shared out by rank instead of by copy; noise by place in the batch."""
    ((alone, _),) = run_on_ranks(make_in_layout, folders, tmp_path / "one", Layout(), world_size=1)
    ranks = run_on_ranks(make_in_layout, folders, tmp_path / "two", layout, world_size=2)
    for latents, _ in ranks:
        assert (latents - alone).abs().max() < 1e-5 * alone.abs().max()
    assert [written is None for _, written in ranks] == [False, True]
    videos, settings = ranks[0][1]
    assert [sample["prompt"] for sample in settings["samples"]] == PROMPTS
    for video, whole in zip(videos, made["all"][0], strict=True):
        assert abs(video - whole).max() <= 2


def test_the_prompt_changes_the_image_and_guidance_strengthens_it(made):
    empty, other, weak, strong = (made[name][0][0] for name in ("empty", "empty other", "weak", "strong"))
    assert abs(strong - empty).mean() > abs(weak - empty).mean() > 0
    assert abs(other - empty).max() == 0, "without guidance the prompt plays no part"


def test_a_negative_prompt_takes_the_place_of_the_empty_one(made):
    """Without guidance nothing else plays a part: it is drawn as if it were the prompt."""
    (away,), settings = made["away"]
    assert (away == made["weak"][0][0]).all() and (away != made["empty"][0][0]).any()
    assert settings["negative_prompt"] == PROMPTS[0]


def test_mistakes_are_told_before_a_model_is_loaded(folders, monkeypatch, tmp_path):
    def loaded(folder):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nemo_moviegen.training.checkpoint.load_video_model", loaded)
    monkeypatch.setattr("nemo_moviegen.training.autoencoder_weights.load_autoencoder", loaded)
    for words, changed in {
        "run folder .*nowhere does not exist": {"run": tmp_path / "nowhere"},
        "text encoder folder .*nothing": {"encoders": tmp_path / "nothing"},
        "width_px is 40": {"width_px": 40},
        "latent height 64 needs 32 positions": {"height_px": 512},
        r"fps is 0\.1; use": {"fps": 0.1},
        "fps is 5000; use": {"fps": 5000},
        "autoencoder folder .* holds a run of tiny": {"autoencoder": folders["run"]},
        "is no video model": {"run": folders["tae"]},
        "6 heads do not split over tensor 4": {"layout": Layout(tensor=4)},
        "12 tokens do not split over tensor 1 x context 5": {"layout": Layout(context=5)},
    }.items():
        with pytest.raises(ValueError, match=words):
            make(folders, tmp_path / "out", PROMPTS, **changed)
    assert not (tmp_path / "out").exists()
