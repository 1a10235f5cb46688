"""Samples of any shapes to one pack: nothing is padded but text, and each clip is what it is in a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.data.collate import collate, collate_packed
from nemo_moviegen.data.latents import LatentSample
from nemo_moviegen.inputs import TokenLimits
from nemo_moviegen.sizes import ContextSize

CONTEXTS = (
    ContextSize(name="ul2", width=6, max_tokens=9),
    ContextSize(name="byt5", width=4, max_tokens=5),
)
MEAN_C, STD_C = np.array([1, -2, 0.5], np.float32), np.array([2, 0.5, 3], np.float32)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
exact = settings(derandomize=True, deadline=None, max_examples=50)


def sample(number, shape, lengths, channels=3):
    rng = np.random.default_rng(number)
    frames, rows, columns = shape
    return LatentSample(
        sample_id=2**62 + number,
        clip_id=f"clip{number}",
        caption="",
        fps=16.0,
        latent_TCHW=rng.normal(size=(frames, channels, 2 * rows, 2 * columns)).astype(np.float16),
        contexts={
            size.name: rng.normal(size=(length, size.width)).astype(np.float32)
            for size, length in zip(CONTEXTS, lengths, strict=True)
        },
    )


@exact
@given(st.lists(st.tuples(shapes, st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_each_clip_of_a_pack_is_what_it_is_in_a_batch_of_its_own(drawn):
    samples = [sample(i, shape, lengths) for i, (shape, *lengths) in enumerate(drawn)]
    epochs = list(range(len(samples)))
    options = {"statistics": (MEAN_C, STD_C), "token_limits": TokenLimits(ul2=4), "latent_channels": 3}
    pack = collate_packed(samples, epochs, CONTEXTS, torch.float64, **options)
    assert len(pack.latents) == len(samples)
    assert pack.sample_ids.tolist() == [s.sample_id for s in samples] and pack.epochs.tolist() == epochs
    ul2, byt5 = zip(*(lengths for _, *lengths in drawn), strict=True)
    assert [mask.shape[1] for mask in pack.masks] == [min(4, max(ul2)), max((1, *byt5))]
    for row, one in enumerate(samples):
        alone = collate([one], [row], CONTEXTS, torch.float64, **options)
        assert torch.equal(pack.latents[row], alone.latent_BTCHW[0])
        texts = zip(pack.contexts, pack.masks, alone.contexts, alone.masks, strict=True)
        for context, mask, own_context, own_mask in texts:
            own = own_mask.shape[1]
            assert torch.equal(context[row, :own], own_context[0])
            assert torch.equal(mask[row, :own], own_mask[0])
            assert not mask[row, own:].any() and not context[row, own:].any()


def test_no_latent_of_a_pack_is_padded_and_text_only_to_the_longest():
    samples = [sample(0, (4, 3, 2), (2, 0)), sample(1, (1, 1, 1), (7, 3))]
    pack = collate_packed(samples, [0, 0], CONTEXTS)
    assert [tuple(latent.shape) for latent in pack.latents] == [(4, 3, 6, 4), (1, 3, 2, 2)]
    assert [tuple(context.shape) for context in pack.contexts] == [(2, 7, 6), (2, 3, 4)]
    assert [mask.sum(dim=1).tolist() for mask in pack.masks] == [[2, 7], [0, 3]]


def test_latents_are_normalised_by_channel_or_left_as_stored():
    one = sample(0, (2, 1, 2), (1, 1))
    stored = collate_packed([one], [0], CONTEXTS).latents[0]
    assert torch.equal(stored, torch.from_numpy(one.latent_TCHW.astype(np.float32)))
    normalised = collate_packed([one], [0], CONTEXTS, statistics=(MEAN_C, STD_C)).latents[0]
    for channel in range(3):
        wanted = (stored[:, channel] - MEAN_C[channel]) / STD_C[channel]
        torch.testing.assert_close(normalised[:, channel], wanted, rtol=1e-6, atol=1e-6)


def test_a_pack_changes_dtype_but_not_ids_and_masks():
    samples = [sample(0, (2, 1, 1), (2, 1)), sample(1, (1, 2, 1), (3, 0))]
    pack = collate_packed(samples, [0, 5], CONTEXTS).to("cpu", torch.bfloat16)
    assert {t.dtype for t in (*pack.latents, *pack.contexts)} == {torch.bfloat16}
    assert {mask.dtype for mask in pack.masks} == {torch.bool}
    assert pack.sample_ids.tolist() == [2**62, 2**62 + 1] and pack.epochs.tolist() == [0, 5]


def test_what_does_not_fit_the_recipe_is_refused_by_the_name_of_the_clip():
    good = sample(0, (2, 1, 1), (2, 1))
    with pytest.raises(ValueError, match="clip1 has 4 latent channels, the model takes 3"):
        collate_packed([good, sample(1, (1, 1, 1), (1, 1), channels=4)], [0, 0], CONTEXTS, latent_channels=3)
    with pytest.raises(ValueError, match="clip1 has no text token of any encoder"):
        collate_packed([good, sample(1, (1, 1, 1), (0, 0))], [0, 0], CONTEXTS)
    with pytest.raises(ValueError, match="clip0 has no byt5 features"):
        collate_packed([replace(good, contexts={"ul2": good.contexts["ul2"]})], [0], CONTEXTS)
    for samples, epochs in (([], []), ([good], [0, 1])):
        with pytest.raises(ValueError, match="a batch needs one epoch for each sample"):
            collate_packed(samples, epochs, CONTEXTS)
