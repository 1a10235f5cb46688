"""Toy encoders: the classes of the real ones at toy width, seeded random weights, small tokenizers."""

import json
from pathlib import Path

import torch

from nemo_moviegen.text_encoders.weights import is_clip

# Words of the Moving Shapes captions and of their like; anything else is spelt in letters.
_TOY_WORDS = (
    "a an the and of on in at to its is with that from big small fps 16 24 red green blue yellow white black "
    "navy gray orange purple circle square triangle shape moves moving stands still left right up down "
    "slowly quickly fast slow background cartoon rabbit burrow meadow video image clip sign reads"
)
_TOY_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_TOY_SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]


def write_toy_encoders(folder, context_sizes, seed=0) -> Path:
    """Encoders of the recipe's widths with seeded random weights, as `TextEncoders.load` reads them.

    Two layers each. Their tokenizers know the words of Moving Shapes and spell any other word; features have
    unit deviation and tell words apart, so a model can learn from them. Returns the folder. ValueError if a
    subfolder holds an encoder that is no toy: those take hours to fetch.
    """
    from transformers import ByT5Tokenizer

    for offset, size in enumerate(context_sizes):
        subfolder = Path(folder) / size.name
        _check_replaceable(subfolder)
        tokenizer = ByT5Tokenizer() if size.name == "byt5" else _toy_tokenizer(with_start=is_clip(size.name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000 + offset)
            build = _toy_clip if is_clip(size.name) else _toy_t5
            model = build(size, len(tokenizer))
        # the weights last: a folder without them does not load
        tokenizer.save_pretrained(subfolder)
        model.save_pretrained(subfolder)
    return Path(folder)


def _check_replaceable(subfolder):
    config = subfolder / "config.json"
    if config.is_file() and not json.loads(config.read_text()).get("is_toy"):
        raise ValueError(
            f"{subfolder} holds an encoder that is no toy; choose another folder for the toy weights"
        )


def _toy_tokenizer(with_start):
    """Lower-cased words and punctuation; unknown words letter by letter, what is no ASCII as <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    punctuation = list("-.,:;!?'\"()/&%+")
    pieces = [
        *_TOY_SPECIAL,
        *_TOY_WORDS.split(),
        *punctuation,
        *_TOY_LETTERS,
        *(f"##{c}" for c in _TOY_LETTERS),
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=1000))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    template = "<s> $A </s>" if with_start else "$A </s>"
    special = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def _toy_t5(size, vocab_size):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=size.width,
        d_kv=max(8, size.width // 4),
        d_ff=2 * size.width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_toy=True,
    )
    return T5EncoderModel(config)


def _toy_clip(size, vocab_size):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=size.max_tokens,
        pad_token_id=_TOY_SPECIAL.index("<pad>"),
        bos_token_id=_TOY_SPECIAL.index("<s>"),
        eos_token_id=_TOY_SPECIAL.index("</s>"),
        is_toy=True,
    )
    model = CLIPTextModel(config)
    embeddings = model.text_model.embeddings
    with torch.no_grad():  # CLIP starts them at 0.02: the layers' output would drown the words
        embeddings.token_embedding.weight.normal_(std=1.0)
        embeddings.position_embedding.weight.normal_(std=0.5)
    return model
