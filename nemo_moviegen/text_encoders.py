"""Frozen text encoders: UL2, MetaCLIP and ByT5 for video (Movie Gen s3.1.4), T5 for audio (s6.1).

They are read from a local folder, never from a hub. It has one subfolder for each name of the recipe's
`size.contexts`, as transformers saves a model and its tokenizer: config.json, *.safetensors and the
tokenizer's files. Toy encoders are the same classes at toy width, with seeded random weights.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.prompts import quoted_text

logger = logging.getLogger(__name__)

_T5_NAMES, _CLIP_NAMES = ("ul2", "byt5", "t5"), ("metaclip",)

# Words of the Moving Shapes captions and of their like; anything else is spelt in letters.
_TOY_WORDS = (
    "a an the and of on in at to its is with that from big small fps 16 24 red green blue yellow white black "
    "navy gray orange purple circle square triangle shape moves moving stands still left right up down "
    "slowly quickly fast slow background cartoon rabbit burrow meadow video image clip sign reads"
)
_TOY_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_TOY_SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]


class TextEncoders:
    """The frozen encoders of one model, in the order of its contexts. Made by `load`.

    `num_cut` counts, for each name, the prompts that were longer than the recipe's `max_tokens`.
    """

    def __init__(self, context_sizes, models, tokenizers):
        self.context_sizes = tuple(context_sizes)
        self.num_cut = {size.name: 0 for size in self.context_sizes}
        self._models, self._tokenizers = models, tokenizers

    @classmethod
    def load(cls, folder, context_sizes, *, device="cpu", dtype=torch.float32) -> "TextEncoders":
        """Encoders of every context from `folder`/<name>, in evaluation mode and without gradients.

        ValueError names the folder or file that is missing or damaged, a width other than the context's, and
        a position table shorter than its `max_tokens`.
        """
        models, tokenizers = {}, {}
        for size in context_sizes:
            subfolder = Path(folder) / size.name
            _check_files(subfolder, size, context_sizes)
            models[size.name] = _load_model(subfolder, size, dtype).to(device)
            tokenizers[size.name] = _load_tokenizer(subfolder, size)
        return cls(context_sizes, models, tokenizers)

    def encode(self, prompts) -> list[dict[str, np.ndarray]]:
        """Features of each prompt: for every encoder, float32 [L, width] of its last layer, real tokens only.

        Each sees the prompt as it is, frames per second included; ByT5 sees what stands in quotation marks
        alone, and has L = 0 where nothing does. Longer prompts are cut to the recipe's `max_tokens` and
        counted. The empty prompt, unconditional for guidance, has the closing tokens of UL2 and MetaCLIP.
        """
        # half of a surrogate pair, as a broken file name may hold, is no UTF-8 and stops a tokenizer
        prompts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]
        features = [{} for _ in prompts]
        for size in self.context_sizes:
            texts = [quoted_text(prompt) for prompt in prompts] if size.name == "byt5" else prompts
            for row, feature_LD in zip(features, self._encode_texts(size, texts), strict=True):
                row[size.name] = feature_LD
        return features

    def _encode_texts(self, size, texts):
        features = [np.zeros((0, size.width), np.float32) for _ in texts]
        rows = [row for row, text in enumerate(texts) if text or size.name != "byt5"]
        if rows:
            hidden_BLD, mask_BL = self._run(size, [texts[row] for row in rows])
            for row, hidden_LD, mask_L in zip(rows, hidden_BLD, mask_BL, strict=True):
                features[row] = hidden_LD[mask_L].float().cpu().numpy()
        return features

    @torch.no_grad()
    def _run(self, size, texts):
        tokenizer, model = self._tokenizers[size.name], self._models[size.name]
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        self._count_cut(size, sum(length > size.max_tokens for length in lengths), max(lengths))
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=size.max_tokens, return_tensors="pt"
        ).to(model.device)
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.last_hidden_state, tokens["attention_mask"].bool()

    def _count_cut(self, size, num_cut, longest):
        if num_cut and not self.num_cut[size.name]:
            logger.warning(
                "%s: a prompt of %d tokens is cut to %d (said once, counted in num_cut)",
                size.name,
                longest,
                size.max_tokens,
            )
        self.num_cut[size.name] += num_cut


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
        tokenizer = ByT5Tokenizer() if size.name == "byt5" else _toy_tokenizer(is_clip=_is_clip(size.name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000 + offset)
            build = _toy_clip if _is_clip(size.name) else _toy_t5
            model = build(size, len(tokenizer))
        # the weights last: a folder without them does not load
        tokenizer.save_pretrained(subfolder)
        model.save_pretrained(subfolder)
    return Path(folder)


def _is_clip(name):
    if name not in _T5_NAMES + _CLIP_NAMES:
        raise ValueError(f"no text encoder {name!r}; known: {', '.join(_T5_NAMES + _CLIP_NAMES)}")
    return name in _CLIP_NAMES


def _check_files(subfolder, size, context_sizes):
    model_class = "CLIPTextModel" if _is_clip(size.name) else "T5EncoderModel"
    missing = None
    if not subfolder.is_dir():
        missing = "the folder"
    elif not (subfolder / "config.json").is_file():
        missing = "config.json"
    elif not list(subfolder.glob("*.safetensors")):
        missing = "*.safetensors"
    elif not any(
        (subfolder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "spiece.model")
    ):
        missing = "the tokenizer (tokenizer_config.json and its files)"
    if missing:
        names = ", ".join(f"{s.name}/ ({s.width} wide)" for s in context_sizes)
        raise ValueError(
            f"text encoder {size.name}: {missing} is missing in {subfolder}. {subfolder.parent} needs "
            f"{names}, each with config.json, *.safetensors and tokenizer files: download the model, load it "
            f"with transformers' {model_class}, call save_pretrained on it and on its tokenizer. "
            "Toy weights of a tiny model: `moviegen encode --toy-encoders` writes them."
        )


def _load_model(subfolder, size, dtype):
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, T5EncoderModel

    model_class = CLIPTextModel if _is_clip(size.name) else T5EncoderModel
    try:
        model, report = model_class.from_pretrained(
            subfolder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"text encoder {size.name}: {subfolder} does not load: {reason}; write it again"
        ) from error
    if report["missing_keys"]:  # transformers would go on with random weights
        raise ValueError(
            f"text encoder {size.name}: the weights in {subfolder} lack {sorted(report['missing_keys'])[0]} "
            f"and maybe others; save the whole {model_class.__name__} there"
        )
    config = model.config
    if config.hidden_size != size.width:
        raise ValueError(
            f"text encoder {size.name}: {subfolder} is {config.hidden_size} wide, the recipe expects "
            f"{size.width}; use the encoder the recipe names, or change its size.contexts"
        )
    positions = getattr(config, "max_position_embeddings", size.max_tokens)  # T5 has relative positions
    if positions < size.max_tokens:
        raise ValueError(
            f"text encoder {size.name}: {subfolder} has {positions} positions, the recipe keeps "
            f"{size.max_tokens} tokens; use the long-prompt encoder, or set max_tokens to {positions}"
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(subfolder, size):
    from transformers import AutoTokenizer

    # sentencepiece reads its own file; its conversion to a fast tokenizer wants a newer protobuf than NeMo's
    use_fast = (subfolder / "tokenizer.json").is_file() or not (subfolder / "spiece.model").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(subfolder, local_files_only=True, use_fast=use_fast)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(
            f"text encoder {size.name}: the tokenizer in {subfolder} does not load: {error}"
        ) from error
    if tokenizer.pad_token is None:
        raise ValueError(f"text encoder {size.name}: the tokenizer in {subfolder} has no padding token")
    tokenizer.padding_side = "right"
    return tokenizer


def _check_replaceable(subfolder):
    config = subfolder / "config.json"
    if config.is_file() and not json.loads(config.read_text()).get("is_toy"):
        raise ValueError(
            f"{subfolder} holds an encoder that is no toy; choose another folder for the toy weights"
        )


def _toy_tokenizer(is_clip):
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
    template = "<s> $A </s>" if is_clip else "$A </s>"
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
