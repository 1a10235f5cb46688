"""Folders of text encoders: published layouts load, bad ones are refused with what to do."""

import json
import shutil

import pytest

from nemo_moviegen.sizes import VIDEO_TINY, ContextSize
from nemo_moviegen.text_encoders import TextEncoders, write_toy_encoders

CONTEXTS = VIDEO_TINY.contexts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_encoders(tmp_path_factory.mktemp("encoders"), CONTEXTS, seed=3)


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "encoders")


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


def sharded(folder):
    """The UL2 of a folder, saved in several files with an index."""
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder / "ul2")
    (folder / "ul2" / "model.safetensors").unlink()
    model.save_pretrained(folder / "ul2", max_shard_size="60KB")
    return folder / "ul2"


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (
            lambda f: next(f.glob("*-00002-of-*")).unlink(),
            "00002-of-.*is missing, model.safetensors.index.json",
        ),
        (
            lambda f: halve(next(f.glob("*-00002-of-*"))),
            "00002-of-.* is truncated or damaged .*copy it again",
        ),
        (lambda f: halve(f / "model.safetensors.index.json"), "index.json does not load, it is truncated"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json does not load"),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "files and no model.safetensors.index.json",
        ),
    ],
)
def test_damaged_shards_are_named(folder, tmp_path, damage, match):
    bad = sharded(copy_of(folder, tmp_path))
    TextEncoders.load(bad.parent, CONTEXTS[:1])
    damage(bad)
    with pytest.raises(ValueError, match=match) as error:
        TextEncoders.load(bad.parent, CONTEXTS[:1])
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("ending", [".bin", ".pt"])
def test_a_pickle_is_refused_unopened_with_what_to_do(folder, tmp_path, ending):
    bad = copy_of(folder, tmp_path)
    (bad / "byt5" / "model.safetensors").unlink()
    # opened, it would raise ZeroDivisionError: a pickle is a program
    (bad / "byt5" / f"pytorch_model{ending}").write_bytes(b"cbuiltins\neval\n(S'1/0'\ntR.")
    match = r"pytorch_model\.\w+ is a pickle.*T5EncoderModel and call save_pretrained"
    with pytest.raises(ValueError, match=match):
        TextEncoders.load(bad, CONTEXTS)


def test_an_encoder_of_another_class_is_refused(folder, tmp_path):
    bad = copy_of(folder, tmp_path)
    shutil.rmtree(bad / "ul2")
    shutil.copytree(bad / "metaclip", bad / "ul2")
    with pytest.raises(ValueError, match="ul2 holds a model of type 'clip_text_model', not t5"):
        TextEncoders.load(bad, CONTEXTS)


def test_weights_of_another_shape_than_the_configuration_are_refused(folder, tmp_path):
    bad = copy_of(folder, tmp_path)
    config = json.loads((bad / "byt5" / "config.json").read_text())
    (bad / "byt5" / "config.json").write_text(json.dumps(config | {"d_ff": config["d_ff"] * 2}))
    with pytest.raises(
        ValueError, match=r"wi_0.weight has the shape \[64, 32\], config.json says \[128, 32\]"
    ):
        TextEncoders.load(bad, CONTEXTS)
