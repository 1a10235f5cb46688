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
from nemo_moviegen.sizes import VIDEO_TINY, ContextSize
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
    np.testing.assert_allclose(with_rate["byt5"], first["byt5"], atol=ROUNDING)
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
            np.testing.assert_allclose(feature, row[name], atol=ROUNDING)


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
    closing = encoders._tokenizers["ul2"]([long], truncation=True, max_length=24)["input_ids"][0][-1]
    assert closing == encoders._tokenizers["ul2"].eos_token_id


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


def write_real_layout(folder):
    """UL2 as published (sentencepiece, encoder and decoder) and CLIP (both towers, vocabulary, merges)."""
    import sentencepiece
    from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

    for name in ("ul2", "metaclip"):
        (folder / name).mkdir(parents=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("a red circle moves to the right\nthe blue square is on a black background\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "ul2" / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "ul2" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    config = T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(folder / "ul2", max_shard_size="60KB")

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789-")
    pieces = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "metaclip" / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "metaclip" / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "metaclip" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    end = len(pieces) - 1
    text = {"vocab_size": len(pieces), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": end - 1,
        "eos_token_id": end,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    both = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16})
    CLIPModel(both).save_pretrained(folder / "metaclip")


def test_folders_of_published_layout_load(tmp_path):
    write_real_layout(tmp_path)
    contexts = (
        ContextSize(name="ul2", width=64, max_tokens=24),
        ContextSize(name="metaclip", width=64, max_tokens=256),
    )
    assert len(list((tmp_path / "ul2").glob("*.safetensors"))) > 1  # several shards
    encoders = TextEncoders.load(tmp_path, contexts)
    short, long = encoders.encode(["red", "red " * 400])
    assert short["metaclip"].shape == (1 + 2, 64)
    assert long["metaclip"].shape == (256, 64)  # beyond the 77 of the tokenizer's file
    assert long["ul2"].shape == (24, 64) and 2 <= len(short["ul2"]) < 6


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda f: shutil.rmtree(f), "the folder is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "safetensors is missing"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "the tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "does not load"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9000]),
            "not load",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer in .* does not load"),
        (lambda f: (f / "config.json").write_text("{"), "does not load"),
    ],
)
def test_a_missing_or_damaged_file_is_named(folder, tmp_path, damage, match):
    bad = copy_of(folder, tmp_path)
    damage(bad / "metaclip")
    with pytest.raises(ValueError, match=match) as error:
        TextEncoders.load(bad, CONTEXTS)
    assert str(bad / "metaclip") in str(error.value)


def test_missing_weights_are_told_how_to_get(tmp_path):
    with pytest.raises(ValueError, match=r"ul2/ \(64 wide\).*save_pretrained.*--toy-encoders"):
        TextEncoders.load(tmp_path / "nowhere", CONTEXTS)


def test_weights_that_lack_a_tensor_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    bad = copy_of(folder, tmp_path)
    path = bad / "ul2" / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if "block.1.layer.0" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack encoder.block.1.layer.0"):
        TextEncoders.load(bad, CONTEXTS)


@pytest.mark.parametrize(
    "context, match",
    [
        (ContextSize(name="ul2", width=4096, max_tokens=24), "64 wide, the recipe expects 4096"),
        (ContextSize(name="metaclip", width=64, max_tokens=256), "24 positions, the recipe keeps 256"),
        (ContextSize(name="gpt", width=64, max_tokens=24), "no text encoder 'gpt'; known: ul2"),
    ],
)
def test_an_encoder_that_does_not_fit_the_recipe_is_refused(folder, context, match):
    with pytest.raises(ValueError, match=match):
        TextEncoders.load(folder, (context,))


def test_toy_weights_do_not_replace_real_ones(folder, tmp_path):
    real = copy_of(folder, tmp_path)
    config = json.loads((real / "byt5" / "config.json").read_text())
    config.pop("is_toy")
    (real / "byt5" / "config.json").write_text(json.dumps(config))
    weights = (real / "byt5" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no toy"):
        write_toy_encoders(real, CONTEXTS, seed=9)
    assert (real / "byt5" / "model.safetensors").read_bytes() == weights
