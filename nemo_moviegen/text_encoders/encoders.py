"""All frozen encoders of a model behind one call: prompts in, features of their real tokens out (s3.1.4)."""

import logging
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.prompts import quoted_text
from nemo_moviegen.text_encoders import sharding, weights

logger = logging.getLogger(__name__)

SHARDED = "ul2"
"""The one encoder worth sharding: 8.7B parameters; the others are replicated, as in the paper."""


def encoder_device():
    """(device, dtype) encoders run at on this rank: bfloat16 on its GPU if there is one, else float32."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    return torch.device("cpu"), torch.float32


class TextEncoders:
    """The frozen encoders of one model, in the order of its contexts. Made by `load`.

    `num_cut` counts, for each name, the prompts that were longer than the recipe's `max_tokens`.
    """

    def __init__(self, context_sizes, models, tokenizers, group=None):
        self.context_sizes = tuple(context_sizes)
        self.num_cut = {size.name: 0 for size in self.context_sizes}
        self._models, self._tokenizers, self._group = models, tokenizers, group

    @classmethod
    def load(cls, folder, context_sizes, *, device="cpu", dtype=None, shard_group=None) -> "TextEncoders":
        """Encoders of every context from `folder`/<name>, in evaluation mode and without gradients.

        `dtype` is by default bfloat16 on GPUs and float32 elsewhere. With `shard_group`, a process group or
        mesh, UL2 lies in slices over its ranks, none of which ever holds it whole; `encode` is then
        collective. ValueError names the folder or file that is missing or damaged, a model of another class
        or width than the context's, and a position table shorter than its `max_tokens`.
        """
        device = torch.device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        models, tokenizers = {}, {}
        for size in context_sizes:
            subfolder = Path(folder) / size.name
            weights.check_files(subfolder, size, context_sizes)
            model = weights.empty_model(size, weights.read_config(subfolder, size), dtype)
            tokenizers[size.name] = _load_tokenizer(subfolder, size)
            if shard_group is not None and size.name == SHARDED:
                sharding.shard_over(model, shard_group, device.type)
            models[size.name] = weights.fill(model, subfolder, size, device)
        return cls(context_sizes, models, tokenizers, shard_group)

    def encode(self, prompts) -> list[dict[str, np.ndarray]]:
        """Features of each prompt: for every encoder, float32 [L, width] of its last layer, real tokens only.

        Each sees the prompt as it is, frames per second included; ByT5 sees what stands in quotation marks
        alone, and has L = 0 where nothing does. Longer prompts are cut to the recipe's `max_tokens`, closing
        token included, and counted. The empty prompt, unconditional for guidance, has the closing tokens of
        UL2 and MetaCLIP.

        A prompt is encoded on its own: its features are the same bits whatever else is asked for. Where UL2
        is sharded all ranks of its group call this together, with any number of prompts each.
        """
        # half of a surrogate pair, as a broken file name may hold, is no UTF-8 and stops a tokenizer
        prompts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]
        features = [{} for _ in prompts]
        for size in self.context_sizes:
            texts = [quoted_text(prompt) for prompt in prompts] if size.name == "byt5" else prompts
            others = self._num_others(size, len(texts))
            for row, text in zip(features, texts, strict=True):
                row[size.name] = self._encode_text(size, text)
            for _ in range(others):
                self._run(size, "")
        return features

    def _encode_text(self, size, text):
        if size.name == "byt5" and not text:
            return np.zeros((0, size.width), np.float32)
        return self._run(size, text).float().cpu().numpy()

    def _num_others(self, size, number):
        """Forwards a rank with fewer prompts adds, so that ranks with more can gather their weights."""
        if self._group is None or size.name != SHARDED:
            return 0
        return sharding.most_of(number, self._group, self._models[size.name].device) - number

    @torch.no_grad()
    def _run(self, size, text):
        tokenizer, model = self._tokenizers[size.name], self._models[size.name]
        length = len(tokenizer(text, verbose=False)["input_ids"])
        if length > size.max_tokens:
            self._count_cut(size, length)
        tokens = tokenizer(text, truncation=True, max_length=size.max_tokens, return_tensors="pt")
        tokens = tokens.to(model.device)
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.last_hidden_state[0]

    def _count_cut(self, size, length):
        if not self.num_cut[size.name]:
            logger.warning(
                "%s: a prompt of %d tokens is cut to %d (said once, counted in num_cut)",
                size.name,
                length,
                size.max_tokens,
            )
        self.num_cut[size.name] += 1


def _load_tokenizer(subfolder, size):
    from transformers import AutoTokenizer

    # sentencepiece reads its own file; its conversion to a fast tokenizer wants a newer protobuf than NeMo's
    use_fast = (subfolder / "tokenizer.json").is_file() or not (subfolder / "spiece.model").is_file()
    try:
        return AutoTokenizer.from_pretrained(subfolder, local_files_only=True, use_fast=use_fast)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(
            f"text encoder {size.name}: the tokenizer in {subfolder} does not load: {error}"
        ) from error
