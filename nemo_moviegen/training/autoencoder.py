"""Training of the temporal autoencoder (Movie Gen s3.1.1): clips, and images one step in four.

A run folder holds recipe.yaml, last.ckpt (weights, optimiser, step), metrics.jsonl, tensorboard/ and, if
files were bad, quarantine.jsonl. Samples, and the noise of each, are functions of (seed, sample, step), so a
run that was killed goes on with the losses it would have had.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.data.clips import read_manifest, sample_id
from nemo_moviegen.data.order import BatchOrder
from nemo_moviegen.flow import draw_noise
from nemo_moviegen.recipe import RECIPE_FILE, TaeRecipe, read_recipe
from nemo_moviegen.tae.losses import kl_loss, l1_loss, outlier_penalty, squared_error
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training.record import quiet, write_recipe

CHECKPOINT_FILE = "last.ckpt"


def train_autoencoder(recipe: TaeRecipe) -> dict | None:
    """Train on the ranks this process was started among; returns the last step's metrics on rank 0.

    Ranks come from torchrun's environment; one process trains alone. A run folder with a checkpoint goes on
    from it. ValueError where batch, manifest or run folder do not fit, before anything is built.
    """
    num_ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if recipe.layout.model_ranks > 1:
        raise ValueError(f"{recipe.name}: an autoencoder is not split; set layout.tensor=1 layout.context=1")
    accumulate = recipe.num_microbatches(num_ranks)
    checkpoint = _own_checkpoint(recipe)
    data = TrainingClips(recipe, rank, num_ranks)
    if checkpoint:
        data.first_step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)[
            "global_step"
        ]

    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    from nemo_moviegen.training.autoencoder_module import AutoencoderModule, RunFolder

    quiet()
    torch.manual_seed(recipe.seed)  # the same fresh weights on every rank
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        strategy=_strategy(num_ranks),
        devices=ranks_per_node,
        num_nodes=num_ranks // ranks_per_node,
        precision={"bf16": "bf16-mixed", "fp32": "32-true", "fp64": "64-true"}[recipe.precision],
        max_steps=recipe.num_steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=recipe.optim.clip_grad,
        callbacks=[RunFolder(recipe, data)],
        logger=TensorBoardLogger(recipe.output, name="tensorboard", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if rank == 0:
        write_recipe(recipe)
    trainer.fit(AutoencoderModule(recipe, data.sample_ids), data, ckpt_path=checkpoint)
    return getattr(trainer, "last_metrics", None)


def load_autoencoder(run_folder) -> TemporalAutoencoder:
    """The autoencoder of a run's last checkpoint, on the CPU, in eval mode; ValueError if there is none."""
    recipe_file, checkpoint = Path(run_folder, RECIPE_FILE), Path(run_folder, CHECKPOINT_FILE)
    if not recipe_file.is_file() or not checkpoint.is_file():
        raise ValueError(
            f"{run_folder} holds no trained autoencoder ({RECIPE_FILE} and {CHECKPOINT_FILE}): "
            "train one with `moviegen train tiny.tae`, or name another run folder"
        )
    recipe = read_recipe(recipe_file)
    if not isinstance(recipe, TaeRecipe):
        raise ValueError(f"{run_folder} is a run of {recipe.name}, which is no autoencoder; name another run")
    autoencoder = TemporalAutoencoder(recipe.autoencoder)
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    autoencoder.load_state_dict({name.removeprefix("autoencoder."): value for name, value in weights.items()})
    return autoencoder.eval()


def losses(recipe, autoencoder, video_BTCHW, sample_ids, step) -> dict:
    """All losses of one micro-batch as scalars: loss (weighted sum), l1, squared_error, kl, outlier.

    The latent is drawn from the posterior with noise keyed by (seed, sample id, step).
    """
    posterior = autoencoder.encode(video_BTCHW)
    mean_BTCHW = posterior.mean_BTCHW
    noise_BTCHW = draw_noise(mean_BTCHW.shape[1:], recipe.seed, sample_ids, [step] * len(sample_ids))
    latent_BTCHW = posterior.sample(noise_BTCHW.to(mean_BTCHW))
    rebuilt_BTCHW = autoencoder.decode(latent_BTCHW, num_frames=video_BTCHW.shape[1])
    found = {
        "l1": l1_loss(rebuilt_BTCHW, video_BTCHW),
        "squared_error": squared_error(rebuilt_BTCHW, video_BTCHW),
        "kl": kl_loss(*posterior),
        "outlier": outlier_penalty(mean_BTCHW, recipe.outlier_scale),
    }
    reconstruction = found["squared_error"] if step < recipe.squared_error_steps else found["l1"]
    loss = recipe.l1_weight * reconstruction + recipe.kl_weight * found["kl"]
    if step >= recipe.outlier_from_step:
        loss = loss + recipe.outlier_weight * found["outlier"]
    return {"loss": loss, **found}


class TrainingClips:
    """Micro-batches (video_BTCHW, rows) of one rank from `first_step` on, decoded by DALI, without end.

    Which rows a step takes is a function of the step: nothing needs saving for a resume.
    """

    def __init__(self, recipe, rank, num_ranks):
        every_clip = read_manifest(recipe.data.manifest)
        self.recipe, self.first_step = recipe, 0
        split_N, kind_N = every_clip.column("split"), every_clip.column("kind")
        self.clips = every_clip.select(split_N == "train")
        self.heldout = every_clip.select((split_N == "heldout") & (kind_N == "video"))
        self.sample_ids = [sample_id(clip_id) for clip_id in self.clips.column("clip_id")]
        self.accumulate = recipe.num_microbatches(num_ranks)
        self.rank, self.num_ranks = rank, num_ranks
        self.batch_size = {"video": recipe.global_batch, "image": recipe.image_batch or recipe.global_batch}
        shapes = np.ones((len(self.clips), 3), int)
        shapes[self.clips.column("kind") == "video", 0] = 2  # the order asks no more than which are images
        needed = {self.kind(step) for step in range(min(recipe.num_steps, recipe.image_steps + 64))}
        self._orders = {
            kind: BatchOrder(shapes, self.batch_size[kind], recipe.seed, int(kind == "image"))
            for kind in sorted(needed)
        }

    def kind(self, step) -> str:
        """image or video."""
        every, joint = self.recipe.data.image_every, step - self.recipe.image_steps
        return "image" if joint < 0 or (every and joint % every == every - 1) else "video"

    def rows(self, step) -> list[int]:
        """Rows of `clips` this rank takes at `step`."""
        every, joint = self.recipe.data.image_every, step - self.recipe.image_steps
        images_before = min(step, self.recipe.image_steps) + (max(joint, 0) // every if every else 0)
        kind = self.kind(step)
        rows, _ = self._orders[kind].batch(images_before if kind == "image" else step - images_before)
        share = len(rows) // self.num_ranks
        return rows[self.rank * share : (self.rank + 1) * share]

    def __iter__(self):
        readers = {
            kind: iter(
                self.loader(self.clips, self._rows_of(kind), size // (self.num_ranks * self.accumulate))
            )
            for kind, size in self.batch_size.items()
            if kind in self._orders
        }
        for step in itertools.count(self.first_step):
            for _ in range(self.accumulate):
                yield next(readers[self.kind(step)])

    def _rows_of(self, kind):
        steps = itertools.count(self.first_step)
        return (row for step in steps if self.kind(step) == kind for row in self.rows(step))

    def loader(self, clips, rows, batch_size):
        """A `ClipLoader` over rows of `clips`, on this rank's device."""
        from nemo_moviegen.data.dali import ClipLoader

        return ClipLoader(
            clips,
            self.recipe.data.bucket,
            batch_size=batch_size,
            order=rows,
            device_id=int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else None,
            quarantine=Path(self.recipe.output) / "quarantine.jsonl",
            substitute=True,  # a bad file must not shift the batches of later steps
        )


def _own_checkpoint(recipe):
    """Path of the checkpoint to go on from, or None; ValueError where it is of another autoencoder."""
    checkpoint = Path(recipe.output, CHECKPOINT_FILE)
    if not checkpoint.is_file():
        return None
    before = read_recipe(Path(recipe.output, RECIPE_FILE))
    if getattr(before, "autoencoder", None) != recipe.autoencoder:
        raise ValueError(
            f"{recipe.output} holds a run of another autoencoder, which cannot go on with this one: "
            "set another output, or remove that folder"
        )
    return checkpoint


def _strategy(num_ranks):
    if num_ranks == 1:
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
