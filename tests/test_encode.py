"""The encode stage: clips and captions to shards, through the real decoder, autoencoder and text encoders."""

import json
import logging
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_moviegen.__main__ import main
from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, BIG_BUCK_BUNNY_CAPTION, sample_id, write_manifest
from nemo_moviegen.data.cutting import cut_clips
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.online_text import OnlineText
from nemo_moviegen.data.synthetic import write_moving_shapes
from nemo_moviegen.encode import encode
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.recipe import RECIPE_FILE, AutoencoderSize, Bucket, recipe_yaml
from nemo_moviegen.sizes import VIDEO_TINY, ContextSize
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.text_encoders import TextEncoders, write_toy_encoders
from nemo_moviegen.training.autoencoder_weights import CHECKPOINT_FILE
from nemo_moviegen.validation import heldout_folder
from recipes import tae

CONTEXTS = VIDEO_TINY.contexts
BUCKET = Bucket(
    num_frames=10, height_px=32, width_px=48, fps=16
)  # half the source's rate; the second latent is padded
SMALL = AutoencoderSize(base_width=8, multipliers=(1, 1, 1, 1), blocks_per_level=1)
HALF = 2e-3  # shards are float16, latents about one


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(1)
    return TemporalAutoencoder(SMALL).eval()


@pytest.fixture(scope="module")
def stage(tmp_path_factory, autoencoder):
    """5 train clips and 2 held-out ones with an image each, an autoencoder's run folder, and toy encoders."""
    folder = tmp_path_factory.mktemp("stage")
    clips = write_moving_shapes(folder, 5, num_frames=20, fps=32, seed=1, progress=False)
    clips += write_moving_shapes(folder, 2, num_frames=20, fps=32, seed=1, split="heldout", progress=False)
    write_toy_encoders(folder / "encoders", CONTEXTS)
    recipe = replace(tae.tiny(), autoencoder=SMALL, output=str(folder / "tae"))
    (folder / "tae").mkdir()
    (folder / "tae" / RECIPE_FILE).write_text(recipe_yaml(recipe))
    torch.save({"autoencoder": autoencoder.state_dict()}, folder / "tae" / CHECKPOINT_FILE)
    return types.SimpleNamespace(clips=clips, tae=folder / "tae", encoders=folder / "encoders")


def run(stage, output, clips=None, **settings):
    manifest = write_manifest(output.parent / f"{output.name}.parquet", clips or stage.clips)
    settings = {"bucket": BUCKET, "context_sizes": CONTEXTS, "batch_size": 2} | settings
    return encode([manifest], settings.pop("tae", stage.tae), stage.encoders, output, **settings)


def raw(reader, row):
    """A sample's latent as it was encoded."""
    return reader[row].latent_TCHW


@pytest.fixture(scope="module")
def encoded(stage, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded") / "latents"
    return output, run(stage, output, samples_per_shard=4)


def test_every_clip_and_image_of_the_training_split_is_encoded_once(stage, encoded):
    output, summary = encoded
    reader = LatentReader(output)
    ids = [clip.clip_id for clip in stage.clips if clip.split == "train"]
    assert sorted(reader[row].clip_id for row in range(len(reader))) == sorted(ids)
    assert sorted(reader.sample_ids) == sorted(sample_id(clip_id) for clip_id in ids)
    assert sorted(reader.latent_shapes.tolist()) == [[1, 4, 6]] * 5 + [[2, 4, 6]] * 5
    assert (summary["train"], summary["heldout"], summary["quarantined"]) == (10, 4, [])


def test_latents_are_the_mean_of_the_posterior_of_the_clip(stage, encoded, autoencoder):
    reader = LatentReader(encoded[0])
    row_of = {reader[row].clip_id: row for row in range(len(reader))}
    loader = ClipLoader(stage.clips, BUCKET, batch_size=1, order=range(10))
    for video_BTCHW, (row,) in loader:
        with torch.no_grad():
            expected = autoencoder.encode(video_BTCHW).mean_BTCHW[0].numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(raw(reader, row_of[stage.clips[row].clip_id]), expected, atol=HALF * scale)


def test_every_prompt_starts_with_the_frame_rate_of_the_bucket(stage, encoded):
    reader = LatentReader(encoded[0])
    encoders = TextEncoders.load(stage.encoders, CONTEXTS)
    captions = {clip.clip_id: clip.caption for clip in stage.clips}
    for row in range(len(reader)):
        sample = reader[row]
        expected = encoders.encode([with_fps(captions[sample.clip_id], 16)])[0]
        assert sample.caption == captions[sample.clip_id] and sample.fps == 16
        assert [*sample.contexts] == [*expected]
        for name, feature in expected.items():
            np.testing.assert_allclose(sample.contexts[name], feature, atol=2 * HALF)


def test_the_empty_prompt_lies_beside_the_shards(stage, encoded):
    empty = LatentReader(encoded[0]).empty_prompt
    for name, feature in TextEncoders.load(stage.encoders, CONTEXTS).encode([""])[0].items():
        assert empty[name].shape == feature.shape
        np.testing.assert_allclose(empty[name], feature, atol=2 * HALF)


def test_heldout_clips_are_kept_apart_and_normalised_like_the_training_set(stage, encoded):
    reader, train = LatentReader(heldout_folder(encoded[0])), LatentReader(encoded[0])
    expected = {clip.clip_id for clip in stage.clips if clip.split == "heldout"}
    assert {reader[row].clip_id for row in range(len(reader))} == expected
    np.testing.assert_array_equal(reader.mean_C, train.mean_C)
    np.testing.assert_array_equal(reader.std_C, train.std_C)


def test_a_sample_does_not_depend_on_its_batch(stage, encoded, tmp_path):
    run(stage, tmp_path / "latents", batch_size=3)
    other, reader = LatentReader(tmp_path / "latents"), LatentReader(encoded[0])
    rows = {sample_id: row for row, sample_id in enumerate(other.sample_ids)}
    for row, key in enumerate(reader.sample_ids):
        np.testing.assert_allclose(raw(reader, row), raw(other, rows[key]), atol=HALF)


def test_unreadable_clips_are_named_and_counted_and_the_rest_is_encoded(stage, tmp_path, caplog):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video at all")
    bad = [
        replace(stage.clips[0], clip_id=name, path=str(tmp_path / f"{name}.mp4"))
        for name in ("empty", "text", "absent")
    ]
    train = [clip for clip in stage.clips if clip.split == "train"]
    with caplog.at_level(logging.WARNING, logger="nemo_moviegen.data.encoded"):
        summary = run(stage, tmp_path / "latents", clips=[bad[0], *train[:3], bad[1], *train[3:], bad[2]])
    assert summary["train"] == 10 and summary["quarantined"] == ["empty", "text", "absent"]
    (record,) = [r for r in caplog.records if r.name == "nemo_moviegen.data.encoded"]
    assert "3 clips were left out" in record.getMessage() and "empty, text, absent" in record.getMessage()
    lines = (tmp_path / "latents" / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["clip_id"] for line in lines} == {"empty", "text", "absent"}
    assert len(LatentReader(tmp_path / "latents")) == 10

    run(stage, tmp_path / "latents", clips=train)  # a second run starts its own list
    assert not (tmp_path / "latents" / "quarantine.jsonl").exists()


def test_a_killed_run_leaves_nothing_that_reads_as_complete(stage, tmp_path, monkeypatch):
    output = tmp_path / "latents"
    run(stage, output)
    assert len(LatentReader(output)) == 10 and len(LatentReader(heldout_folder(output))) == 4
    calls, whole = [], TemporalAutoencoder.encode_stream

    def dies(self, videos):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, videos)

    monkeypatch.setattr(TemporalAutoencoder, "encode_stream", dies)
    with pytest.raises(KeyboardInterrupt):
        run(stage, output, samples_per_shard=2)
    for folder in (output, heldout_folder(output)):
        with pytest.raises(ValueError, match="no finished latents"):
            LatentReader(folder)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"bucket": replace(BUCKET, height_px=30)}, "bucket.height_px is 30"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tae": "nowhere"}, "nowhere holds no trained autoencoder"),
        ({"context_sizes": (ContextSize(name="t5", width=64, max_tokens=8),)}, "t5: the folder is missing"),
    ],
)
def test_a_mistake_leaves_the_latents_that_were_there(stage, tmp_path, settings, match):
    output = tmp_path / "latents"
    run(stage, output)
    with pytest.raises(ValueError, match=match):
        run(stage, output, **settings)
    assert len(LatentReader(output)) == 10 and len(LatentReader(heldout_folder(output))) == 4


def test_a_manifest_without_training_clips_is_refused(stage, tmp_path):
    heldout = [clip for clip in stage.clips if clip.split == "heldout"]
    with pytest.raises(ValueError, match="no clip of the split train"):
        run(stage, tmp_path / "latents", clips=heldout)
    with pytest.raises(ValueError, match="no clip manifest"):
        encode(
            [tmp_path / "no.parquet"], "x", stage.encoders, tmp_path, bucket=BUCKET, context_sizes=CONTEXTS
        )


def test_online_text_gives_the_encoded_features_bit_for_bit(stage, encoded):
    """The encode stage took prompts in twos; what a training step reads at once does not matter."""
    reader = LatentReader(encoded[0])
    online = OnlineText(reader, TextEncoders.load(stage.encoders, CONTEXTS))
    for found, wanted in zip(online.read(range(10)), reader.read(range(10)), strict=True):
        for name, feature in wanted.contexts.items():
            np.testing.assert_array_equal(found.contexts[name], feature)
    for name, feature in reader.empty_prompt.items():
        np.testing.assert_array_equal(online.empty_prompt[name], feature)


def test_h264_and_vp9_files_of_two_manifests_get_their_buckets_from_the_command_line(stage, tmp_path, capsys):
    """Two tasks; the second finds all shards there and writes the index."""
    film = cut_clips(BIG_BUCK_BUNNY, 1.5, caption=BIG_BUCK_BUNNY_CAPTION)
    (tmp_path / "no.mp4").write_bytes(b"")
    film.append(replace(film[0], clip_id="empty", path=str(tmp_path / "no.mp4")))
    film.append(replace(film[0], clip_id="short", end_seconds=0.2))
    film.append(stage.clips[0])  # in both manifests
    manifests = [write_manifest(tmp_path / f"{n}.parquet", c) for n, c in enumerate((stage.clips, film))]
    output = tmp_path / "latents"
    command = ["encode", "--buckets", "tiny", "--model", "video_tiny", "--output", str(output)]
    command += ["--autoencoder", str(stage.tae), "--encoders", str(stage.encoders)]
    command += [word for manifest in manifests for word in ("--manifest", str(manifest))]
    assert main([*command, "--task", "1/2"]) == 0
    assert "not finished" in capsys.readouterr().out and not (output / "index.parquet").exists()
    assert main([*command, "--task", "0/2"]) == 0
    said = capsys.readouterr().out
    assert "13 samples, 4 held out" in said and "16x48x96: 3 samples" in said
    assert "1 refused: 0.200 s is too short for tiny" in said and "1 refused: another clip before it" in said
    assert "1 left out for their files' fault, see quarantine.jsonl" in said

    reader = LatentReader(output)
    samples = {sample.clip_id: sample for sample in reader.read(range(13))}
    shapes = {clip.clip_id: samples[clip.clip_id].latent_TCHW.shape for clip in [*stage.clips[:1], *film[:3]]}
    channels = SMALL.latent_channels
    assert set(shapes.values()) == {(1, channels, 8, 8), (2, channels, 6, 12)}
    assert {round(samples[clip.clip_id].fps, 3) for clip in film[:3]} == {16.0}
    assert samples[stage.clips[0].clip_id].fps == pytest.approx(8 / 0.625)
    left_out = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["clip_id"] for entry in left_out] == ["short", stage.clips[0].clip_id, "empty"]
    assert main(command) == 0 and "0 encoded now" in capsys.readouterr().out


def test_bucket_sets_and_a_shape_of_ones_own_exclude_each_other(stage, tmp_path, capsys):
    command = ["encode", "--manifest", "m", "--autoencoder", "t", "--encoders", "e", "--output", "o"]
    assert main([*command, "--buckets", "tiny", "--frames", "8"]) == 2
    assert "--buckets tiny says what shapes clips get: drop --frames" in capsys.readouterr().err
    assert main([*command, "--buckets", "large"]) == 2
    assert "no buckets called 'large'; use video_256, video_768, tiny" in capsys.readouterr().err
