"""Text encoders out of folders: published sizes, saved checkpoints of each class, slices over ranks."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from nemo_moviegen.sizes import AUDIO_13B, VIDEO_30B, VIDEO_TINY
from nemo_moviegen.text_encoders import TextEncoders, write_toy_encoders
from nemo_moviegen.text_encoders.sharding import held_rows, local
from nemo_moviegen.text_encoders.weights import empty_model, fill, read_config

CONTEXTS = VIDEO_TINY.contexts
ROUNDING = 2e-5  # float32, two layers, padded or not
PROMPTS = [
    "a red circle",
    "",
    'a blue square and a sign that reads "OPEN"',
    "a slow green triangle on a " * 9,
]

PUBLISHED = {  # as in the config.json of google/ul2, google/byt5-small and t5-base on the Hugging Face hub
    "ul2": {
        "model_type": "t5",
        "d_model": 4096,
        "d_ff": 16384,
        "d_kv": 256,
        "num_heads": 16,
        "num_layers": 32,
        "num_decoder_layers": 32,
        "feed_forward_proj": "gated-silu",
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    },
    "byt5": {
        "model_type": "t5",
        "d_model": 1472,
        "d_ff": 3584,
        "d_kv": 64,
        "num_heads": 6,
        "num_layers": 12,
        "num_decoder_layers": 4,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "vocab_size": 384,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 768,
        "d_ff": 3072,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    },
    "metaclip": {  # the text tower of OpenCLIP's ViT-bigG-14, its 77 positions grown to the paper's 256
        "model_type": "clip_text_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 256,
        "vocab_size": 49408,
    },
}

# Written out: table, layers (attention, FFN, norms), relative positions of the first T5 layer, last norm.
NUM_PARAMETERS = {
    # 131,596,288 + 32 x 268,443,648 + 512 + 4,096: not half of UL2's 20B, the decoder has cross-attention too
    "ul2": 32128 * 4096 + 32 * (4 * 4096 * (16 * 256) + 3 * 4096 * 16384 + 2 * 4096) + 32 * 16 + 4096,
    "byt5": 384 * 1472 + 12 * (4 * 1472 * (6 * 64) + 3 * 1472 * 3584 + 2 * 1472) + 32 * 6 + 1472,
    "t5": 32128 * 768 + 12 * (4 * 768 * (12 * 64) + 2 * 768 * 3072 + 2 * 768) + 32 * 12 + 768,
    # biases and both halves of LayerNorm; two tables
    "metaclip": (49408 + 256) * 1280
    + 32 * (4 * (1280 * 1280 + 1280) + (1280 * 5120 + 5120) + (5120 * 1280 + 1280) + 4 * 1280)
    + 2 * 1280,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_encoders(tmp_path_factory.mktemp("encoders"), CONTEXTS, seed=3)


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "encoders")


@pytest.mark.parametrize("size", [*VIDEO_30B.contexts, *AUDIO_13B.contexts], ids=lambda size: size.name)
def test_each_encoder_of_published_size_is_what_the_model_takes(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[size.name]))
    model = empty_model(size, read_config(tmp_path, size), torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == NUM_PARAMETERS[size.name]
    assert {(p.device.type, p.dtype) for p in parameters.values()} == {("meta", torch.bfloat16)}
    assert not [name for name in parameters if "decoder" in name or "vision" in name or "lm_head" in name]
    with torch.device("meta"):
        hidden_BLD = model(torch.zeros(1, size.max_tokens, dtype=torch.int64)).last_hidden_state
    assert hidden_BLD.shape == (1, size.max_tokens, size.width)


def test_published_sizes_add_up_to_what_their_makers_say():
    """Of T5-base the encoder is known as 110M, of bigG the text tower with its projection as 695M."""
    assert NUM_PARAMETERS == {
        "ul2": 8_721_797_632,
        "byt5": 217_657_472,
        "t5": 109_628_544,
        "metaclip": 693_250_560,
    }


def test_the_released_77_positions_are_refused_for_256_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["metaclip"] | {"max_position_embeddings": 77}))
    with pytest.raises(ValueError, match=r"has 77 positions, the recipe keeps 256 tokens.* max_tokens to 77"):
        read_config(tmp_path, VIDEO_30B.contexts[1])


def saved_model(name, whole):
    """A seeded model of a class that people save: the encoder alone, or with its decoder or picture tower."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPTextModel,
        T5Config,
        T5EncoderModel,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(5)
    if name == "metaclip":
        text = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 4, "max_position_embeddings": 24, "hidden_act": "quick_gelu"}
        vision = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        }
        both = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16})
        model = CLIPModel(both) if whole else CLIPTextModel(CLIPTextConfig(**text))
    else:
        width = {"ul2": 64, "byt5": 32}[name]
        config = T5Config(
            vocab_size=400,
            d_model=width,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-silu",
        )
        model = (T5ForConditionalGeneration if whole else T5EncoderModel)(config)
    with torch.no_grad():  # as after training: no norm at one, no bias at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tower(model):
    """The part of a saved model whose features count."""
    return getattr(model, "text_model", None) or model.get_encoder()


@pytest.mark.parametrize("shard_size", [None, "30KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("whole", [False, True], ids=["encoder", "whole model"])
@pytest.mark.parametrize("name", ["ul2", "metaclip", "byt5"])
def test_a_saved_checkpoint_gives_the_features_of_its_model(folder, tmp_path, name, whole, shard_size):
    size = next(size for size in CONTEXTS if size.name == name)
    bad = copy_of(folder, tmp_path)
    (bad / name / "model.safetensors").unlink()
    model = saved_model(name, whole)
    model.save_pretrained(bad / name, **({"max_shard_size": shard_size} if shard_size else {}))
    assert (bad / name / "model.safetensors.index.json").is_file() == bool(shard_size)
    encoders = TextEncoders.load(bad, (size,))
    tokenizer = encoders._tokenizers[name]
    texts = ["OPEN", "a"] if name == "byt5" else PROMPTS
    prompts = [f'"{text}"' for text in texts] if name == "byt5" else texts
    found = [features[name] for features in encoders.encode(prompts)]

    padded = tokenizer(texts, padding=True, truncation=True, max_length=size.max_tokens, return_tensors="pt")
    with torch.no_grad():
        hidden_BLD = tower(model)(padded["input_ids"], attention_mask=padded["attention_mask"])[0]
        for row, text in enumerate(texts):
            tokens = tokenizer(text, truncation=True, max_length=size.max_tokens, return_tensors="pt")
            expected_LD = tower(model)(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0][0]
            np.testing.assert_array_equal(found[row], expected_LD)
            real_LD = hidden_BLD[row][padded["attention_mask"][row].bool()]
            np.testing.assert_allclose(found[row], real_LD, atol=ROUNDING)


def test_in_bfloat16_every_weight_is_bfloat16(folder):
    encoders = TextEncoders.load(folder, CONTEXTS, dtype=torch.bfloat16)
    exact = TextEncoders.load(folder, CONTEXTS)
    for name, model in encoders._models.items():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        for parameter, other in zip(model.parameters(), exact._models[name].parameters(), strict=True):
            assert torch.equal(parameter, other.bfloat16())
    for prompt in PROMPTS:
        rough, fine = encoders.encode([prompt])[0], exact.encode([prompt])[0]
        for name in rough:
            np.testing.assert_allclose(rough[name], fine[name], atol=0.15)  # 8 bits, values up to 4


def test_the_decoder_of_a_checkpoint_is_never_read(folder, tmp_path):
    slim = copy_of(folder, tmp_path)
    (slim / "ul2" / "model.safetensors").unlink()
    saved_model("ul2", whole=True).save_pretrained(slim / "ul2", max_shard_size="30KB")
    expected = TextEncoders.load(slim, CONTEXTS[:1]).encode(PROMPTS)
    file_of = json.loads((slim / "ul2" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for tensor, file in file_of.items() if tensor.startswith(("shared", "encoder"))}
    others = set(file_of.values()) - needed
    assert len(others) > 1
    for file in others:
        (slim / "ul2" / file).unlink()
    for features, wanted in zip(TextEncoders.load(slim, CONTEXTS[:1]).encode(PROMPTS), expected, strict=True):
        np.testing.assert_array_equal(features["ul2"], wanted["ul2"])


def test_slices_over_ranks_give_the_features_of_one_rank_bit_for_bit(folder):
    """Also where ranks have different numbers of prompts, none at all, or more than one call."""
    torch.set_num_threads(1)  # as the ranks have
    expected = TextEncoders.load(folder, CONTEXTS).encode(PROMPTS)

    def run():
        encoders = TextEncoders.load(folder, CONTEXTS, shard_group=dist.group.WORLD)
        own = PROMPTS if dist.get_rank() == 0 else PROMPTS[1:2]
        features = encoders.encode(own) + encoders.encode(PROMPTS[:2] if dist.get_rank() else [])
        weights = {name: [*model.parameters()] for name, model in encoders._models.items()}
        held = {name: sum(local(p).nbytes for p in group) for name, group in weights.items()}
        whole = {name: sum(p.numel() * p.element_size() for p in group) for name, group in weights.items()}
        return features, held, whole

    (first, *first_bytes), (second, *second_bytes) = run_on_ranks(run)
    for found, wanted in [(first, expected), (second, [expected[1], *expected[:2]])]:
        for features, row in zip(found, wanted, strict=True):
            for name, feature_LD in row.items():
                np.testing.assert_array_equal(features[name], feature_LD)
    for held, whole in (first_bytes, second_bytes):
        assert abs(held["ul2"] / whole["ul2"] - 0.5) < 0.01
        assert held["metaclip"] == whole["metaclip"] and held["byt5"] == whole["byt5"]
    assert first_bytes[0]["ul2"] + second_bytes[0]["ul2"] == first_bytes[1]["ul2"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_rank_reads_only_the_rows_it_holds(folder, num_ranks):
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_moviegen.text_encoders import shard_over

    size = CONTEXTS[0]
    config = read_config(folder / "ul2", size)
    whole = [p.data for p in fill(empty_model(size, config), folder / "ul2", size).parameters()]

    def run():
        mesh = init_device_mesh("cpu", (num_ranks,))
        model = fill(shard_over(empty_model(size, config), mesh), folder / "ul2", size)
        return [(held_rows(parameter), local(parameter).clone()) for parameter in model.parameters()]

    for pieces in zip(whole, *run_on_ranks(run, world_size=num_ranks), strict=True):
        parameter, ranks = pieces[0], pieces[1:]
        assert [end for (_, end), _ in ranks[:-1]] == [first for (first, _), _ in ranks[1:]]
        for (first, end), piece in ranks:
            assert torch.equal(piece, parameter[first:end])
        assert torch.equal(torch.cat([piece for _, piece in ranks]), parameter)


def test_the_shared_table_of_t5_may_be_stored_under_its_other_name(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    other = copy_of(folder, tmp_path)
    path = other / "ul2" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, path)
    expected = TextEncoders.load(folder, CONTEXTS[:1]).encode(PROMPTS)
    for features, wanted in zip(
        TextEncoders.load(other, CONTEXTS[:1]).encode(PROMPTS), expected, strict=True
    ):
        np.testing.assert_array_equal(features["ul2"], wanted["ul2"])
