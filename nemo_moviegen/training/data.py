"""Latents to micro-batches: which samples this model copy takes at which step, and what prompts it sees."""

import itertools
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from nemo_moviegen import flow
from nemo_moviegen.data.collate import collate
from nemo_moviegen.data.latents import LatentReader
from nemo_moviegen.data.order import BatchOrder
from nemo_moviegen.training.text import with_text


class MicroBatches(torch.utils.data.IterableDataset):
    """Endless micro-batches of one model copy from a step on: a function of the step, nothing needs saving.

    `copy` of `num_copies` counts data-parallel copies; ranks of one copy (tp, cp) get the same samples.
    """

    def __init__(self, reader, order, recipe, copy, num_copies, first_step):
        self.reader, self.order, self.recipe, self.first_step = reader, order, recipe, first_step
        share = recipe.global_batch // num_copies
        self.own = slice(copy * share, (copy + 1) * share)

    def __iter__(self):
        size = self.recipe.size
        for step in itertools.count(self.first_step):
            rows, epochs = (column[self.own] for column in self.order.batch(step))
            for start in range(0, len(rows), self.recipe.micro_batch):
                part = slice(start, start + self.recipe.micro_batch)
                samples = self.reader.read(rows[part])
                samples = [self._drop_prompt(s, e) for s, e in zip(samples, epochs[part], strict=True)]
                yield collate(
                    samples,
                    epochs[part],
                    size.contexts,
                    latent_channels=size.input_channels,
                    token_limits=self.recipe.data.token_limits,
                    statistics=self.reader.statistics,
                )

    def _drop_prompt(self, sample, epoch):
        generator = flow.sample_generator(self.recipe.seed, sample.sample_id, epoch, "prompt_drop")
        if generator.random() >= self.recipe.data.prompt_drop:
            return sample
        return replace(sample, contexts=self.reader.empty_prompt)


class LatentDataModule(pl.LightningDataModule):
    """Hands NeMo's trainer the micro-batches of its rank, from the step it starts or resumes at."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        self.reader = LatentReader(
            recipe.data.folder, skip_damaged=True, quarantine=Path(recipe.output) / "quarantine.jsonl"
        )
        self.order = BatchOrder(
            self.reader.latent_shapes, recipe.global_batch, recipe.seed, recipe.data.image_every
        )
        self.seq_length = recipe.size.num_tokens(self.largest_shape())
        self.global_batch_size, self.micro_batch_size = recipe.global_batch, recipe.micro_batch
        self.data_sampler = OwnMicroBatches(
            seq_len=self.seq_length,
            micro_batch_size=recipe.micro_batch,
            global_batch_size=recipe.global_batch,
            output_log=False,
        )

    def largest_shape(self):
        """Latent (T, H, W) with most tokens; ValueError where a shape does not fit model or layout."""
        shapes = self.reader.distinct_shapes
        for shape in shapes:
            self.recipe.check_tokens(shape)
        return max(shapes, key=self.recipe.size.num_tokens)

    def num_tokens(self, step) -> int:
        """Video tokens of the whole batch of a step."""
        return self.recipe.size.num_tokens(self.order.shape(step)) * self.recipe.global_batch

    def train_dataloader(self):
        from megatron.core import parallel_state

        self.source = with_text(self.reader, self.recipe)
        batches = MicroBatches(
            self.source,
            self.order,
            self.recipe,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            first_step=self.trainer.global_step,
        )
        return torch.utils.data.DataLoader(batches, batch_size=None)


class OwnMicroBatches(MegatronDataSampler):
    """Tells megatron how many micro-batches a step has; the loader already yields those of its rank."""

    def transform_dataloader(self, dataloader, consumed_samples=0):
        return dataloader

    def on_megatron_step_end(self, step): ...
