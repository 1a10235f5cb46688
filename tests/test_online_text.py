"""Text features made while training reads: the numbers of cached ones, token limits alike, ranks in step."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from parallel.runs import recipe as training_recipe
from parallel.runs import train_on_ranks
from ranks import run_on_ranks

from nemo_moviegen.data.collate import collate, cut_text, limit_text
from nemo_moviegen.data.latent_writer import LatentWriter, write_empty_prompt
from nemo_moviegen.data.latents import LatentReader, LatentSample
from nemo_moviegen.data.online_text import OnlineText
from nemo_moviegen.inputs import TokenLimits
from nemo_moviegen.layout import Layout
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.recipe import (
    METRICS_FILE,
    LatentData,
    Validation,
    override,
    read_recipe,
    recipe_yaml,
)
from nemo_moviegen.text_encoders import TextEncoders, write_toy_encoders
from nemo_moviegen.training.data import MicroBatches, batch_order
from nemo_moviegen.training.text import with_text

LIMITS = TokenLimits(ul2=4, metaclip=3, byt5=2)
CAPTIONS = ["a red circle", 'a sign "OK"', "", "a blue square moves slowly to the left on a wall", 'the "X"']


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Latents of 24 captioned samples, cached as `moviegen encode` does, in batches; toy encoders."""
    folder = tmp_path_factory.mktemp("online")
    write_toy_encoders(folder / "encoders", tiny.CONTEXTS, seed=1)
    encoders = TextEncoders.load(folder / "encoders", tiny.CONTEXTS)
    torch.set_num_threads(1)  # as forked ranks have: more threads add in another order
    rng = np.random.default_rng(0)
    captions = [f"{CAPTIONS[i % 5]} {i}" if i % 5 else CAPTIONS[0] for i in range(24)]
    features = encoders.encode([with_fps(caption, 16.0) for caption in captions])
    frames, height, width = tiny.LATENT_SHAPE
    with LatentWriter(folder / "latents") as writer:
        for i, (caption, contexts) in enumerate(zip(captions, features, strict=True)):
            shape = (1 if i % 3 == 0 else frames, tiny.SIZE.input_channels, height, width)
            writer.add(
                LatentSample(
                    sample_id=i,
                    clip_id=f"clip{i}",
                    caption=caption,
                    fps=16.0,
                    contexts=contexts,
                    latent_TCHW=rng.normal(size=shape),
                )
            )
    write_empty_prompt(folder / "latents", encoders.encode([""])[0])
    return folder


def recipes(folders, output, **changes):
    """The same run with cached and with online text."""
    run = training_recipe(output, folders / "latents", **changes)
    data = replace(run.data, prompt_drop=0.4)
    online = replace(data, text="online", text_encoders=str(folders / "encoders"))
    return replace(run, data=data), replace(run, data=online)


def assert_same_contexts(found, wanted):
    assert [*found] == [*wanted]
    for name, features_LD in wanted.items():
        assert found[name].dtype == features_LD.dtype == np.float16
        np.testing.assert_array_equal(found[name], features_LD)


def test_online_features_equal_cached_ones_bit_for_bit_however_they_are_read(folders, tmp_path):
    reader = LatentReader(folders / "latents")
    cached, online = recipes(folders, tmp_path)
    assert with_text(reader, cached) is reader
    fresh = with_text(reader, online)
    assert_same_contexts(fresh.empty_prompt, reader.empty_prompt)
    for rows in ([0], [1, 2, 3], [23, 5, 5, 0], [*range(24)]):
        for found, wanted in zip(fresh.read(rows), reader.read(rows), strict=True):
            assert found.sample_id == wanted.sample_id and found.caption == wanted.caption
            np.testing.assert_array_equal(found.latent_TCHW, wanted.latent_TCHW)
            assert_same_contexts(found.contexts, wanted.contexts)


def test_online_features_come_from_the_caption_not_from_the_shards(folders, tmp_path):
    """So shards may be written without any text."""
    reader = LatentReader(folders / "latents")
    with LatentWriter(tmp_path) as writer:
        for sample in reader.read([1, 2]):
            writer.add(replace(sample, contexts={}))
    encoders = TextEncoders.load(folders / "encoders", tiny.CONTEXTS)
    fresh = OnlineText(LatentReader(tmp_path), encoders).read([0, 1])
    for found, wanted in zip(fresh, reader.read([1, 2]), strict=True):
        assert_same_contexts(found.contexts, wanted.contexts)


@pytest.mark.parametrize("limits", [TokenLimits(), LIMITS])
def test_a_run_gets_the_same_batches_with_dropped_prompts_and_limits(folders, tmp_path, limits):
    reader = LatentReader(folders / "latents")
    batches, num_empty = [], 0
    for run in recipes(folders, tmp_path):
        run = replace(run, data=replace(run.data, token_limits=limits))
        order = batch_order(reader, run)
        source = MicroBatches(with_text(reader, run), order, run, 1, 2, first_step=0)
        batches.append([*itertools.islice(source, 12)])
    for cached, online in zip(*batches, strict=True):
        assert torch.equal(cached.sample_ids, online.sample_ids)
        for size, ours, theirs, mask, other in zip(
            tiny.CONTEXTS, cached.contexts, online.contexts, cached.masks, online.masks, strict=True
        ):
            assert torch.equal(ours, theirs) and torch.equal(mask, other)
            assert mask.sum(1).max() <= limits.of(size)
        num_empty += int((cached.masks[0].sum(1) == 1).sum())
    assert 0 < num_empty < 12  # some prompts were dropped, not all


def test_a_training_run_with_online_text_has_the_losses_of_the_cached_one(folders, tmp_path):
    """Two ranks, each with its own prompts, dropped ones, limits that cut others; model and UL2 in slices."""
    losses = []
    for run in recipes(folders, tmp_path, layout=Layout(sharding="full"), precision="fp32"):
        data = replace(run.data, token_limits=LIMITS)
        measured = Validation(every=2, folder=data.folder, num_samples=5)
        run = replace(run, data=data, num_steps=2, save_every=2, output=str(tmp_path / data.text))
        run = replace(run, validation=measured)
        train_on_ranks(run, 2)
        lines = (tmp_path / data.text / METRICS_FILE).read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines])
        losses[-1].append(json.loads(lines[-1])["validation/loss"])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_ul2_lies_in_slices_over_the_ranks_of_a_fully_sharded_model(folders, tmp_path):
    reader = LatentReader(folders / "latents")
    _, run = recipes(folders, tmp_path, layout=Layout(sharding="full", context=2), precision="fp32")

    def read():
        from megatron.core import parallel_state

        from nemo_moviegen.text_encoders.sharding import local

        parallel_state.initialize_model_parallel(context_parallel_size=2)
        source = with_text(reader, run)
        rank = dist.get_rank()
        samples = source.read([rank]) + source.read([4, 5 + rank])
        held = {name: sum(local(p).numel() for p in m.parameters()) for name, m in models(source).items()}
        return samples, source.empty_prompt, held

    def models(source):
        return source.encoders._models

    one_rank = models(with_text(reader, replace(run, layout=Layout(sharding="none"))))
    whole = {name: sum(p.numel() for p in model.parameters()) for name, model in one_rank.items()}
    results = run_on_ranks(read)
    for rank, (samples, empty, held) in enumerate(results):
        for found, wanted in zip(samples, reader.read([rank, 4, 5 + rank]), strict=True):
            assert_same_contexts(found.contexts, wanted.contexts)
        assert_same_contexts(empty, reader.empty_prompt)
        assert held["metaclip"] == whole["metaclip"] and held["byt5"] == whole["byt5"]
        assert abs(held["ul2"] / whole["ul2"] - 0.5) < 0.02
    assert sum(held["ul2"] for *_, held in results) == whole["ul2"]


def test_cut_text_keeps_the_first_tokens_and_the_closing_one():
    tokens_LD = np.arange(7.0)[:, None]
    assert [*cut_text(tokens_LD, 7)[:, 0]] == [0, 1, 2, 3, 4, 5, 6]
    assert [*cut_text(tokens_LD, 3)[:, 0]] == [0, 1, 6]
    assert [*cut_text(tokens_LD, 1)[:, 0]] == [6]
    assert cut_text(tokens_LD[:0], 3).shape == (0, 1)


def test_limits_cut_a_batch_and_a_prompt_alike(folders):
    samples = LatentReader(folders / "latents").read([1, 4, 7, 10])
    batch = collate(samples, [0] * 4, tiny.CONTEXTS, pad="max", token_limits=LIMITS)
    for size, features_BLD, mask_BL in zip(tiny.CONTEXTS, batch.contexts, batch.masks, strict=True):
        assert features_BLD.shape[1] == mask_BL.shape[1] == LIMITS.of(size)
        for row, sample in enumerate(samples):
            prompt_LD = limit_text(sample.contexts, tiny.CONTEXTS, LIMITS)[size.name]
            np.testing.assert_array_equal(features_BLD[row][mask_BL[row]].numpy(), prompt_LD)
            if len(sample.contexts[size.name]):  # CLIP's closing token, which carries the whole prompt
                np.testing.assert_array_equal(prompt_LD[-1], sample.contexts[size.name][-1])
    whole = collate(samples, [0] * 4, tiny.CONTEXTS, token_limits=TokenLimits())
    assert whole.contexts[0].shape[1] == max(len(sample.contexts["ul2"]) for sample in samples) > 4


@pytest.mark.parametrize(
    ("assignment", "match"),
    [
        ("data.token_limits.ul2=8", "data.token_limits.ul2 is 8; .* at most 7 tokens: use 1 to 7, or 0"),
        ("data.token_limits.byt5=-1", "data.token_limits.byt5 is -1; .* at most 3 tokens"),
        ("data.token_limits.ul3=1", "did you mean 'data.token_limits.ul2'"),
        ("data.text=live", "data.text is 'live'; use cached or online"),
        ("data.text=online", "set data.text_encoders to the folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, assignment, match):
    with pytest.raises(ValueError, match=match):
        override(training_recipe(tmp_path, "latents"), [assignment])


def test_a_limit_for_an_encoder_the_recipe_lacks_is_refused():
    with pytest.raises(ValueError, match=r"byt5 is 2, but the recipe's encoders are ul2, metaclip: leave"):
        LIMITS.check(tiny.CONTEXTS[:2])


def test_limits_and_text_are_settings_that_a_run_folder_keeps(tmp_path):
    run = override(
        training_recipe(tmp_path, "latents"),
        ["data.token_limits.metaclip=3", "data.text=online", "data.text_encoders=somewhere"],
    )
    assert run.data == LatentData(
        folder="latents",
        image_every=3,
        text="online",
        text_encoders="somewhere",
        token_limits=TokenLimits(metaclip=3),
    )
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(run))
    assert read_recipe(tmp_path / "recipe.yaml") == run


def test_encoders_that_are_not_there_stop_a_run_before_its_first_step(folders, tmp_path):
    _, run = recipes(folders, tmp_path)
    run = replace(run, data=replace(run.data, text_encoders=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"nowhere.* needs ul2/ \(24 wide\)"):
        with_text(LatentReader(folders / "latents"), run)


def test_weights_that_overflow_float16_are_named(folders):
    class Broken:
        def encode(self, prompts):
            return [{"ul2": np.full((1, 24), 1e6, np.float32)} for _ in prompts]

    with pytest.raises(ValueError, match="ul2 features of the prompt '' are not finite"):
        OnlineText(LatentReader(folders / "latents"), Broken())
