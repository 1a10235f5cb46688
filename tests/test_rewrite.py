"""Prompts rewritten: by rule nothing is added and no visual text lost; a model is kept to that."""

import pytest

from nemo_moviegen.generation.rewrite import CAMERA, LanguageModel, find_rewrite, rules
from nemo_moviegen.prompts import quoted_text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle moves left slowly on a black background",) * 2,
        ("Please generate a video of a cat asleep", "a cat asleep"),
        ("can you show me a short clip of two dogs", "two dogs"),
        ("a castle, 4k, masterpiece, trending on artstation", "a castle"),
        ("a dancer  turns ,  slowly", "a dancer turns, slowly"),
        ("a bridge at dawn, zoom in", "zoom in, a bridge at dawn"),
        ("a bridge with a tracking shot at dawn", "tracking shot, a bridge at dawn"),
        ('a sign that says "4K  Zoom in", pan left', 'pan left, a sign that says "4K  Zoom in"'),
        ("4k", "4k"),
        ("\U0001f680\U0001f680", "\U0001f680\U0001f680"),
        ("a video camera on a table", "a video camera on a table"),
        ("a tilt updraft", "a tilt updraft"),
    ],
)
def test_rules(prompt, expected):
    assert rules(prompt) == expected


@pytest.mark.parametrize("label", CAMERA)
def test_every_camera_label_goes_to_the_front_once_and_stays_there(label):
    once = rules(f"a lake in fog, {label}")
    assert once == f"{label}, a lake in fog"
    assert rules(once) == once


def test_a_name_is_rules_a_folder_or_nothing(tmp_path):
    assert find_rewrite("") is None
    assert find_rewrite("rules") is rules
    with pytest.raises(ValueError, match="holds no language model"):
        find_rewrite(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not load"):
        find_rewrite(str(tmp_path))("a cat asleep")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """An untrained GPT-2 of some thousand weights with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=256, n_positions=4096, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return LanguageModel(folder, most_tokens=8)


def test_a_model_answers_the_same_twice_and_never_an_empty_prompt(language_model):
    once, again = language_model("a cat asleep"), language_model("a cat asleep")
    assert once == again and once.strip()


def test_the_answer_counts_where_it_keeps_the_visual_text(language_model, monkeypatch):
    answers = {"good": 'A sign reads "OPEN" at night.', "lost": "A sign at night.", "empty": "  "}
    for name, answer in answers.items():
        monkeypatch.setattr(language_model.pair[0], "decode", lambda *_, answer=answer, **__: answer)
        made = language_model('a video of a sign "OPEN"')
        assert made == (answer if name == "good" else 'a sign "OPEN"')
        assert quoted_text(made) == "OPEN"


def test_a_prompt_too_long_for_a_model_goes_by_the_rules(language_model, monkeypatch):
    monkeypatch.setattr(language_model, "pair", None)
    assert language_model("a video of " + "x" * 10_000) == "x" * 10_000
