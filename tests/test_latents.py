"""Latent shards: what is written is read back by row, damage is found, and samples become batches."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_moviegen.data.clips import sample_id
from nemo_moviegen.data.collate import collate
from nemo_moviegen.data.latent_writer import LatentWriter, ShardWriter, finish_folder, write_empty_prompt
from nemo_moviegen.data.latents import LatentReader, LatentSample
from nemo_moviegen.sizes import ContextSize

CONTEXTS = (
    ContextSize(name="ul2", width=6, max_tokens=8),
    ContextSize(name="byt5", width=4, max_tokens=5),
)


def a_sample(number, frames=2, seed=0, channels=3):
    rng = np.random.default_rng((seed, number))
    # on a grid of 1/64, which float16 holds exactly: a comparison then needs no tolerance
    latent = (
        np.round(rng.normal(size=(frames, channels, 4, 4)) * 64) / 64 + np.arange(channels)[:, None, None]
    )
    contexts = {"ul2": np.ones((3 + number % 4, 6)) * number, "byt5": np.ones((number % 3, 4))}
    return LatentSample(
        sample_id=sample_id(f"clip{number}"),
        clip_id=f"clip{number}",
        caption=f"caption {number} \u00e9",
        fps=16.0,
        latent_TCHW=latent.astype(np.float32),
        contexts={name: features.astype(np.float32) for name, features in contexts.items()},
    )


def write(folder, count=10, samples_per_shard=4):
    """Every third sample is an image."""
    samples = [a_sample(n, frames=1 if n % 3 == 2 else 2) for n in range(count)]
    with LatentWriter(folder, samples_per_shard=samples_per_shard) as writer:
        for sample in samples:
            writer.add(sample)
    return samples


def test_samples_come_back_by_row_as_they_are_stored(tmp_path):
    samples = write(tmp_path)
    reader = LatentReader(tmp_path)
    assert len(reader) == 10
    assert reader.sample_ids.tolist() == [sample.sample_id for sample in samples]
    assert reader.latent_shapes.tolist() == [[1 if n % 3 == 2 else 2, 4, 4] for n in range(10)]
    assert reader.sample_ids.dtype == reader.latent_shapes.dtype == np.int64
    assert reader.distinct_shapes == [(1, 4, 4), (2, 4, 4)]
    for row in (7, 0, 9, 3):
        read, written = reader[row], samples[row]
        assert np.array_equal(read.latent_TCHW, written.latent_TCHW) and read.latent_TCHW.dtype == np.float16
        assert (read.sample_id, read.clip_id, read.caption, read.fps) == (
            written.sample_id,
            written.clip_id,
            written.caption,
            16.0,
        )
        assert read.contexts.keys() == written.contexts.keys()
        assert all(np.array_equal(read.contexts[name], written.contexts[name]) for name in read.contexts)


def test_the_statistics_are_those_of_every_element_of_every_sample(tmp_path):
    samples = write(tmp_path)
    reader = LatentReader(tmp_path)
    channels_CN = np.concatenate([s.latent_TCHW.transpose(1, 0, 2, 3).reshape(3, -1) for s in samples], 1)
    np.testing.assert_allclose(reader.mean_C, channels_CN.mean(1), rtol=1e-5)
    np.testing.assert_allclose(reader.std_C, channels_CN.std(1), rtol=1e-5)


def test_a_channel_that_never_varies_is_centred_and_stays_finite(tmp_path):
    sample = a_sample(0)
    sample.latent_TCHW[:, 1] = 5.0
    with LatentWriter(tmp_path) as writer:
        writer.add(sample)
    reader = LatentReader(tmp_path)
    batch = collate([reader[0]], [0], CONTEXTS, statistics=reader.statistics)
    assert torch.all(batch.latent_BTCHW[0, :, 1] == 0) and batch.latent_BTCHW.isfinite().all()


def test_a_batch_is_normalised_by_the_statistics_of_its_reader(tmp_path):
    samples = write(tmp_path)
    reader = LatentReader(tmp_path)
    batch = collate(reader.read([0, 3, 1]), [0, 0, 0], CONTEXTS, statistics=reader.statistics)
    for read_TCHW, row in zip(batch.latent_BTCHW, [0, 3, 1], strict=True):
        centred = samples[row].latent_TCHW - reader.mean_C[:, None, None]
        assert np.array_equal(read_TCHW.numpy(), centred / reader.std_C[:, None, None])
    raw = collate(reader.read([0, 3, 1]), [0, 0, 0], CONTEXTS)
    assert np.array_equal(raw.latent_BTCHW[1].numpy(), samples[3].latent_TCHW)
    assert raw.latent_BTCHW.dtype == batch.latent_BTCHW.dtype == torch.float32


def test_the_webdataset_package_reads_the_shards(tmp_path):
    import webdataset

    samples = write(tmp_path)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert len(shards) == 3
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert [entry["json"]["clip_id"] for entry in read] == [sample.clip_id for sample in samples]
    for entry, sample in zip(read, samples, strict=True):
        assert entry["latent.npy"].dtype == np.float16
        assert np.array_equal(entry["latent.npy"], sample.latent_TCHW)
        assert np.array_equal(entry["byt5.npy"], sample.contexts["byt5"])


def test_the_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_reading_a_row_reads_only_its_bytes(tmp_path, monkeypatch):
    from nemo_moviegen.data import latents, shards

    reads = []

    class Watched(shards.ShardFile):
        def read_into(self, view, offset):
            reads.append(len(view))
            return super().read_into(view, offset)

    write(tmp_path, samples_per_shard=10)
    monkeypatch.setattr(latents, "ShardFile", Watched)
    LatentReader(tmp_path)[5]
    assert len(reads) == 1 and reads[0] < (tmp_path / "shard-000000.tar").stat().st_size / 8


def test_the_empty_prompt_comes_back(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"empty_prompt.npz is missing: run `moviegen encode`"):
        _ = LatentReader(tmp_path).empty_prompt
    write_empty_prompt(tmp_path, {"ul2": np.full((1, 6), 0.5), "byt5": np.zeros((0, 4))})
    empty = LatentReader(tmp_path).empty_prompt
    assert np.array_equal(empty["ul2"], np.full((1, 6), 0.5, np.float32)) and empty["byt5"].shape == (0, 4)


def test_a_killed_writer_leaves_nothing_that_reads_as_complete(tmp_path):
    write(tmp_path)  # a complete set, which the second writer replaces
    with pytest.raises(KeyboardInterrupt), LatentWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(5):
            writer.add(a_sample(number))
        raise KeyboardInterrupt
    with pytest.raises(
        ValueError, match=r"no finished latents in .* \(index.parquet is missing\): run `moviegen encode`"
    ):
        LatentReader(tmp_path)
    write(tmp_path, count=4)
    assert len(LatentReader(tmp_path)) == 4 and not list(tmp_path.glob("*.part"))


def test_the_writer_refuses_what_would_be_wrong_later(tmp_path):
    writer = LatentWriter(tmp_path)
    with pytest.raises(ValueError, match="no sample was written"):
        writer.close()
    writer.add(a_sample(0))
    with pytest.raises(ValueError, match=r"clip0: its id .* is there already"):
        writer.add(a_sample(0))
    with pytest.raises(ValueError, match="clip1: 5 latent channels, those before it have 3"):
        writer.add(a_sample(1, channels=5))
    with pytest.raises(ValueError, match="clip2: latents are not finite in float16"):
        writer.add(replace(a_sample(2), latent_TCHW=np.full((1, 3, 4, 4), 1e6, np.float32)))
    with pytest.raises(ValueError, match=r"clip3: latents of shape \(3, 4, 4\) are not"):
        writer.add(replace(a_sample(3), latent_TCHW=np.zeros((3, 4, 4), np.float32)))


def test_a_set_of_shards_with_one_sample_twice_is_refused(tmp_path):
    for name in ("a-000000", "b-000000"):
        with ShardWriter(tmp_path, name) as writer:
            writer.add(a_sample(1))
            writer.finish()
    with pytest.raises(ValueError, match="sample clip1 is in two shards"):
        finish_folder(tmp_path, ["a-000000", "b-000000"])


def damage(folder, how):
    """Harm the second shard: rows 4 to 7."""
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            member = next(m for m in tar if m.name.endswith("latent.npy"))
        data[member.offset_data + 200] ^= 1  # one bit of the first sample's latent
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_an_incomplete_shard_is_named_when_the_folder_is_opened(tmp_path, how):
    write(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=r"shard-000001.tar: sample clip7 cannot be read: .*moviegen encode"):
        LatentReader(tmp_path)


def test_one_flipped_bit_is_found_when_the_sample_is_read(tmp_path):
    write(tmp_path)
    damage(tmp_path, "flipped")
    reader = LatentReader(tmp_path)
    assert reader[5].clip_id == "clip5"
    with pytest.raises(ValueError, match=r"shard-000001.tar: sample clip4 cannot be read: its checksum"):
        reader[4]
    with pytest.raises(ValueError, match="clip4"):
        reader.read([3, 4])


@pytest.mark.parametrize(("how", "bad"), [("missing", {4, 5, 6, 7}), ("truncated", {6, 7}), ("flipped", {4})])
def test_training_goes_on_without_the_damaged_samples(tmp_path, how, bad):
    write(tmp_path)
    damage(tmp_path, how)
    quarantine = tmp_path / "quarantine.jsonl"
    reader = LatentReader(tmp_path, skip_damaged=True, quarantine=quarantine)
    read = [int(sample.clip_id.removeprefix("clip")) for sample in reader.read(range(10))]
    for row, got in enumerate(read):
        # the next sample of the same shape that is whole, around the end
        candidates = [
            (row + step) % 10 for step in range(10) if ((row + step) % 10 % 3 == 2) == (row % 3 == 2)
        ]
        assert got == next(c for c in candidates if c not in bad)
    assert reader.quarantined == len(bad)
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {entry["clip_id"] for entry in entries} == {f"clip{row}" for row in bad}
    assert all("shard-000001.tar" in entry["reason"] for entry in entries)
    # another rank, which reads other rows first, gets the same
    other = LatentReader(tmp_path, skip_damaged=True)
    assert [int(other.read([row])[0].clip_id.removeprefix("clip")) for row in reversed(range(10))] == read[
        ::-1
    ]


def test_a_shape_without_a_whole_sample_is_an_error(tmp_path):
    write(tmp_path, samples_per_shard=100)
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="every sample of shape 2x4x4 is damaged"):
        LatentReader(tmp_path, skip_damaged=True).read([0])


def test_a_damaged_index_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "index.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"index.parquet is damaged"):
        LatentReader(tmp_path)


def test_a_batch_is_padded_and_masked_in_the_order_of_the_contexts():
    samples = [a_sample(n) for n in (1, 2, 3)]
    batch = collate(samples, [0, 1, 2], CONTEXTS, dtype=torch.float64)
    assert batch.latent_BTCHW.shape == (3, 2, 3, 4, 4) and batch.latent_BTCHW.dtype == torch.float64
    ul2, byt5 = batch.contexts
    assert ul2.shape == (3, 6, 6) and byt5.shape == (3, 2, 4) and ul2.dtype == torch.float64
    assert batch.masks[0].sum(1).tolist() == [4, 5, 6] and batch.masks[1].sum(1).tolist() == [1, 2, 0]
    for place, sample in enumerate(samples):
        for context, mask, size in zip(batch.contexts, batch.masks, CONTEXTS, strict=True):
            assert np.array_equal(context[place][mask[place]].numpy(), sample.contexts[size.name])
            assert not context[place][~mask[place]].any()
    assert batch.sample_ids.tolist() == [sample.sample_id for sample in samples]
    assert batch.epochs.tolist() == [0, 1, 2] and batch.epochs.dtype == torch.int64
    assert not batch.is_image


def test_padding_to_the_maximum_has_one_shape_and_an_encoder_without_text_one_masked_token():
    for number in (0, 1, 2):
        batch = collate([a_sample(number)], [0], CONTEXTS, pad="max")
        assert [context.shape for context in batch.contexts] == [(1, 8, 6), (1, 5, 4)]
    batch = collate([a_sample(0), a_sample(3)], [0, 0], CONTEXTS)
    assert batch.contexts[1].shape == (2, 1, 4) and not batch.masks[1].any()


def test_a_batch_refuses_what_the_recipe_does_not_take():
    sample = a_sample(4)
    with pytest.raises(ValueError, match=r"features of ul2 are \(3, 6\), the recipe's width is 7: run"):
        collate([sample], [0], (replace(CONTEXTS[0], width=7),))
    with pytest.raises(ValueError, match="no metaclip features, only ul2, byt5: run `moviegen encode`"):
        collate([sample], [0], (ContextSize(name="metaclip", width=4, max_tokens=8),))
    with pytest.raises(ValueError, match="3 tokens of ul2, the recipe takes 2"):
        collate([sample], [0], (replace(CONTEXTS[0], max_tokens=2),))
    with pytest.raises(ValueError, match=r"3 latent channels, the model takes 16: set size.input_channels=3"):
        collate([sample], [0], CONTEXTS, latent_channels=16)
    with pytest.raises(ValueError, match="a batch takes one shape"):
        collate([sample, a_sample(5, frames=1)], [0, 0], CONTEXTS)
    with pytest.raises(ValueError, match="1 samples and 2 epochs"):
        collate([sample], [0, 0], CONTEXTS)
    mute = replace(sample, contexts={name: text[:0] for name, text in sample.contexts.items()})
    with pytest.raises(ValueError, match="clip4 has no text token of any encoder"):
        collate([a_sample(1), mute], [0, 0], CONTEXTS)
    with pytest.raises(ValueError, match="pad is 'short'"):
        collate([sample], [0], CONTEXTS, pad="short")
