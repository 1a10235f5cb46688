"""Latents to micro-batches: which samples this model copy takes at which step, and what prompts it sees."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from nemo_moviegen import flow
from nemo_moviegen.data.ahead import ahead
from nemo_moviegen.data.collate import collate, collate_packed
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.online_text import OnlineText
from nemo_moviegen.data.order import BatchOrder
from nemo_moviegen.flops import token_cost
from nemo_moviegen.precision import is_fp8
from nemo_moviegen.training.step import data_dtype, with_noise
from nemo_moviegen.training.text import with_text
from nemo_moviegen.training_objective import OBJECTIVES


class MicroBatches(torch.utils.data.IterableDataset):
    """Endless micro-batches of one model copy from a step on: a function of the step, nothing needs saving.

    `copy` of `num_copies` counts data-parallel copies; ranks of one copy (tp, cp) get the same samples.
    `source` is a reader of samples, or an `OnlineText` around one. A thread reads and collates
    `data.prefetch` micro-batches ahead; captions are encoded when they are due, by the thread that trains:
    encoders in slices over ranks take part in collectives, whose order all ranks must share.
    """

    def __init__(self, source, order, recipe, copy, num_copies, first_step):
        self.source, self.order, self.recipe, self.first_step = source, order, recipe, first_step
        self.copy, self.num_copies = copy, num_copies
        self._pad = "max" if is_fp8(recipe.precision) else "longest"  # FP8 takes no odd number of text tokens

    def __iter__(self):
        prefetch = self.recipe.data.prefetch
        if not isinstance(self.source, OnlineText):
            return ahead(itertools.starmap(self._collate, self._read(self.source)), prefetch)
        read = ahead(self._read(self.source.reader), prefetch)
        return (self._collate(self.source.with_text(samples), *rest) for samples, *rest in read)

    def _read(self, reader):
        """(samples, epochs, whether they are a pack) of one micro-batch after the other."""
        for step in itertools.count(self.first_step):
            is_pack = self.order.batching == "packed" and self.order.kind(step) == "video"
            for rows, epochs in self.order.micro_batches(step, self.copy, self.num_copies):
                yield reader.read(rows), epochs, is_pack

    def _collate(self, samples, epochs, is_pack):
        size = self.recipe.size
        samples = [self._drop_prompt(s, e) for s, e in zip(samples, epochs, strict=True)]
        batch = (collate_packed if is_pack else collate)(
            samples,
            epochs,
            size.contexts,
            latent_channels=size.input_channels,
            token_limits=self.recipe.data.token_limits,
            statistics=self.source.statistics,
            **({} if is_pack else {"pad": self._pad}),
        )
        objective = OBJECTIVES[self.recipe.objective]
        return with_noise(batch, self.recipe.seed, data_dtype(self.recipe.precision), objective)

    def _drop_prompt(self, sample, epoch):
        generator = flow.sample_generator(self.recipe.seed, sample.sample_id, epoch, "prompt_drop")
        if generator.random() >= self.recipe.data.prompt_drop:
            return sample
        return replace(sample, contexts=self.source.empty_prompt)


class LatentDataModule(pl.LightningDataModule):
    """Hands NeMo's trainer the micro-batches of its rank, from the step it starts or resumes at."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        self.reader = LatentReader(
            recipe.data.folder, skip_damaged=True, quarantine=Path(recipe.output) / "quarantine.jsonl"
        )
        self.order = batch_order(self.reader, recipe)
        self.seq_length = recipe.size.num_tokens(self.largest_shape())
        self.global_batch_size, self.micro_batch_size = recipe.global_batch, recipe.micro_batch
        self.data_sampler = OwnMicroBatches(
            seq_len=self.seq_length,
            micro_batch_size=recipe.micro_batch,
            global_batch_size=recipe.global_batch,
            output_log=False,
        )

    def largest_shape(self):
        """Latent (T, H, W) with most tokens; ValueError where one that steps take does not fit the recipe."""
        shapes = [
            shape for shape, tokens in zip(self.order.shapes, self.order.tokens_S, strict=True) if tokens
        ]
        self.recipe.check_shapes(shapes)
        return max(shapes, key=self.recipe.size.num_tokens)

    def num_tokens(self, step) -> int:
        """Video tokens of the whole batch of a step."""
        return self.order.num_tokens(step)

    def train_dataloader(self):
        from megatron.core import parallel_state

        self.source = with_text(self.reader, self.recipe)
        num_copies = parallel_state.get_data_parallel_world_size()
        if self.trainer.is_global_zero and (advice := self.order.advice(num_copies)):
            print(f"{self.recipe.name}: {advice}", flush=True)
        return MicroBatches(
            self.source,
            self.order,
            self.recipe,
            parallel_state.get_data_parallel_rank(),
            num_copies,
            first_step=self.trainer.global_step,
        )


def batch_order(reader, recipe) -> BatchOrder:
    """The order in which a `VideoRecipe` takes the samples of a reader.

    ValueError where a pack has no room for the longest of them.
    """
    tokens_of = recipe.size.num_tokens
    longest = max((shape for shape in reader.distinct_shapes if shape[0] > 1), key=math.prod, default=None)
    if recipe.data.batching == "packed" and longest and tokens_of(longest) > recipe.pack_tokens:
        raise ValueError(
            f"{recipe.name}: a pack holds the tokens of the recipe's largest latent, {recipe.pack_tokens}, "
            f"and {recipe.data.folder} has latents of {tokens_of(longest)}: set latent_frames={longest[0]} "
            f"latent_height={longest[1]} latent_width={longest[2]}"
        )
    return BatchOrder(
        reader.latent_shapes,
        recipe.global_batch,
        recipe.seed,
        recipe.data.image_every,
        micro_batch=recipe.micro_batch,
        image_batch=recipe.image_batch,
        batching=recipe.data.batching,
        cost=token_cost(recipe.size),
        num_tokens=tokens_of,
        max_tokens=recipe.pack_tokens,
    )


class OwnMicroBatches(MegatronDataSampler):
    """Tells megatron how many micro-batches a step has; the loader already yields those of its rank."""

    def transform_dataloader(self, dataloader, consumed_samples=0):
        return dataloader

    def on_megatron_step_end(self, step): ...
