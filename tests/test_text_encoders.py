"""Text encoders (Movie Gen s3.1.4): what each sees, toy features, published layouts, bad folders."""

import itertools
import json
import logging
import shutil
import socket

import numpy as np
import pytest
import torch

from nemo_moviegen.data import synthetic
from nemo_moviegen.data.clips import BIG_BUCK_BUNNY_CAPTION
from nemo_moviegen.prompts import with_fps
from nemo_moviegen.sizes import VIDEO_TINY
from nemo_moviegen.text_encoders import TextEncoders, write_toy_encoders

CONTEXTS = VIDEO_TINY.contexts
ROUNDING = 2e-5  # float32, two layers, other batch shapes

COLORS = tuple(synthetic.COLORS)
SHAPES = tuple(synthetic.SHAPES)
DIRECTIONS = tuple(synthetic.DIRECTIONS)
SPEEDS = tuple(synthetic.SPEEDS)
BACKGROUNDS = tuple(synthetic.BACKGROUNDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_encoders(tmp_path_factory.mktemp("encoders"), CONTEXTS, seed=3)


@pytest.fixture(scope="module")
def encoders(folder):
    return TextEncoders.load(folder, CONTEXTS)


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "encoders")


def moving_shapes():
    """All captions with their words."""
    rows = []
    for color, shape, direction, speed, background in itertools.product(
        COLORS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS
    ):
        spec = synthetic.ShapeSpec(
            color=color, shape=shape, direction=direction, speed=speed, background=background
        )
        rows.append((with_fps(synthetic.caption(spec), 16), (color, shape, direction, speed, background)))
    return rows


def test_one_call_gives_every_encoder_its_real_tokens(encoders):
    short, long = encoders.encode(["a red circle", 'a red circle and a sign that reads "OPEN"'])
    assert [*short] == ["ul2", "metaclip", "byt5"]
    assert short["ul2"].shape == (3 + 1, 64)  # three words and the closing token
    assert short["metaclip"].shape == (3 + 2, 64)  # an opening token too
    assert long["byt5"].shape == (4 + 1, 32)  # the bytes of OPEN
    assert all(feature.dtype == np.float32 for feature in short.values())


def test_byt5_sees_only_quoted_text_and_the_others_see_all(encoders):
    first, second, none = encoders.encode(['a "HI" sign', 'big red "HI" on a wall', "HI on a wall"])
    np.testing.assert_array_equal(first["byt5"], second["byt5"])
    assert none["byt5"].shape == (0, 32)
    assert first["ul2"].shape != second["ul2"].shape
    with_rate = encoders.encode([with_fps('a "HI" sign', 16)])[0]
    np.testing.assert_array_equal(with_rate["byt5"], first["byt5"])
    assert len(with_rate["ul2"]) == len(first["ul2"]) + 3  # fps - 16


def test_the_empty_prompt_has_features_for_guidance(encoders):
    empty = encoders.encode([""])[0]
    assert {name: len(feature) for name, feature in empty.items()} == {"ul2": 1, "metaclip": 2, "byt5": 0}
    assert encoders.encode([]) == []


def test_features_do_not_depend_on_the_batch(encoders):
    prompts = ["a red circle", 'a blue square moves right, "STOP"', "", "a"]
    together = encoders.encode(prompts)
    for prompt, row in zip(prompts, together, strict=True):
        for name, feature in encoders.encode([prompt])[0].items():
            np.testing.assert_array_equal(feature, row[name])  # online text relies on it


def test_the_last_layer_is_returned(encoders):
    tokenizer, model = encoders._tokenizers["ul2"], encoders._models["ul2"]
    tokens = tokenizer(["a red circle"], return_tensors="pt")
    expected = model(input_ids=tokens["input_ids"], output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(encoders.encode(["a red circle"])[0]["ul2"], expected, atol=ROUNDING)


def test_encoders_are_frozen(encoders):
    for model in encoders._models.values():
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_long_prompts_are_cut_and_said_once(folder, caplog):
    encoders = TextEncoders.load(folder, CONTEXTS)
    long = "a red circle " * 30
    with caplog.at_level(logging.WARNING, logger="nemo_moviegen.text_encoders"):
        first, _ = encoders.encode([long, long + '"' + "OPEN " * 10 + '"'])
        encoders.encode([long, "a red circle"])
    assert {name: len(feature) for name, feature in first.items()} == {"ul2": 24, "metaclip": 24, "byt5": 0}
    assert encoders.num_cut == {"ul2": 3, "metaclip": 3, "byt5": 1}
    assert sorted(record.args[0] for record in caplog.records) == ["byt5", "metaclip", "ul2"]
    for name in ("ul2", "metaclip"):  # a cut prompt ends as a whole one
        tokenizer = encoders._tokenizers[name]
        assert tokenizer(long, truncation=True, max_length=24)["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "prompt",
    ["\U0001f600\U0001f389", "caf\u00e9 \u770b\u677f", "\ud800 half", "\x00\n\t", "x" * 5000, '"\ud800"'],
)
def test_any_text_encodes(encoders, prompt):
    for feature in encoders.encode([prompt])[0].values():
        assert np.isfinite(feature).all()


def test_captions_of_the_demo_are_whole_known_words(encoders):
    real = f"FPS-16 {BIG_BUCK_BUNNY_CAPTION}"
    for name in ("ul2", "metaclip"):
        tokenizer = encoders._tokenizers[name]
        for prompt, words in [*moving_shapes(), (real, BIG_BUCK_BUNNY_CAPTION.split())]:
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
            assert set(words) <= set(tokens) and "<unk>" not in tokens
            assert len(tokens) <= 24


@pytest.mark.parametrize("name", ["ul2", "metaclip"])
def test_words_of_moving_shapes_are_linearly_readable(encoders, name):
    rows = moving_shapes()
    pooled = np.stack([feature[name].mean(0) for feature in encoders.encode([prompt for prompt, _ in rows])])
    inputs = np.concatenate([pooled, np.ones((len(rows), 1))], 1)
    is_seen = np.random.default_rng(0).random(len(rows)) < 0.7
    for kind, vocabulary in enumerate((COLORS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)):
        labels = np.array([vocabulary.index(words[kind]) for _, words in rows])
        weights = np.linalg.lstsq(inputs[is_seen], np.eye(len(vocabulary))[labels[is_seen]], rcond=None)[0]
        read = (inputs[~is_seen] @ weights).argmax(1)
        assert (read == labels[~is_seen]).mean() > 0.97, vocabulary


@pytest.mark.parametrize("name", ["ul2", "metaclip"])
def test_toy_features_have_unit_deviation_and_tell_words_apart(encoders, name):
    tokens = np.concatenate([f[name] for f in encoders.encode([prompt for prompt, _ in moving_shapes()])])
    assert 0.8 < np.sqrt((tokens**2).mean()) < 1.2
    variance_D = tokens.var(0)  # over some 20 different words: single channels scatter
    assert 0.7 < variance_D.mean() < 1.1 and variance_D.min() > 0.1 and variance_D.max() < 3
    words = [*COLORS, *SHAPES, *DIRECTIONS]
    features = [encoders.encode([word])[0][name] for word in words]
    own = np.stack([feature[-2] for feature in features])  # the word's own token, before the closing one
    distance = np.linalg.norm(own[:, None] - own[None], axis=-1) / np.sqrt(own.shape[1])
    assert distance[~np.eye(len(words), dtype=bool)].min() > 0.5


def test_toy_weights_are_a_function_of_the_seed(tmp_path, folder, encoders):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    again = TextEncoders.load(write_toy_encoders(tmp_path / "again", CONTEXTS, seed=3), CONTEXTS)
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    other = TextEncoders.load(write_toy_encoders(tmp_path / "other", CONTEXTS, seed=4), CONTEXTS)
    prompt = 'a red "X"'
    for name, feature in encoders.encode([prompt])[0].items():
        np.testing.assert_array_equal(feature, again.encode([prompt])[0][name])
        assert np.abs(feature - other.encode([prompt])[0][name]).max() > 0.1


def test_loading_never_opens_a_connection(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("a text encoder went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextEncoders.load(folder, CONTEXTS).encode(["a"])[0]["ul2"].shape == (2, 64)


def test_toy_weights_do_not_replace_real_ones(folder, tmp_path):
    real = copy_of(folder, tmp_path)
    config = json.loads((real / "byt5" / "config.json").read_text())
    config.pop("is_toy")
    (real / "byt5" / "config.json").write_text(json.dumps(config))
    weights = (real / "byt5" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no toy"):
        write_toy_encoders(real, CONTEXTS, seed=9)
    assert (real / "byt5" / "model.safetensors").read_bytes() == weights
