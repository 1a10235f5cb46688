"""Samples from fixed prompts while a run trains: what the weights of a step make of them (s3.4).

The prompts are captions of the first held-out samples, whose text features lie in their latent shards; each
is sampled at its sample's own duration and size, from noise that is a function of (seed, sample). So two
steps of a run differ by the weights alone, and no layout changes a sample. Copies of the model share the
prompts; the first rank of each decodes its own and writes them.

    samples/step=N/NNN.json    prompt, sample id, latent shape, what the picture shows
    samples/step=N/NNN.png     a strip of frames, evenly spaced
    samples/step=N/NNN.mp4     the clip, where an autoencoder decoded it

The weights are those that training has, not their moving average. Nothing of training notices: the model runs
without gradients, and no random number but the sample's own is drawn.
"""

import json
import os
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state

from nemo_moviegen import flow
from nemo_moviegen.data.collate import collate
from nemo_moviegen.progress import SAMPLES_FOLDER
from nemo_moviegen.sampling import decode, keeping, sample_latents, step_of
from nemo_moviegen.training.validation import first_rows, heldout_reader, shares, text_of
from nemo_moviegen.video.embeddings import unpatchify
from nemo_moviegen.video.model import without_fp8
from nemo_moviegen.video.parallel import gather_tokens
from nemo_moviegen.video_files import pick_frames, stream_mp4, write_png

EMULATED_STEPS = 250
"""Even steps that the few stand for (s3.4)."""
STRIP_FRAMES = 8
STRIP_PX = 128
"""Height of a strip at most."""
_DECODED, _LATENT = "frames", "channels 1 to 3 of the latent"

Prompt = namedtuple("Prompt", "number row shape")
"""Place in the grid, row of the reader, latent (T, H, W)."""


class Samples(pl.Callback):
    """Samples every `progress.samples_every` steps; goes before who tells how long it took.

    ValueError where the held-out latents or the autoencoder do not serve.
    """

    def __init__(self, recipe, data):
        self.recipe, self.data = recipe, data
        self.values = {}
        """What metrics.jsonl says of the step that has just ended: samples/seconds, or nothing."""
        self.autoencoder = None
        self.told = False
        """Whether a failure to show a sample was said."""
        progress = recipe.progress
        if progress.samples_every:
            self.schedule = flow.linear_quadratic_schedule(progress.sampling_steps, EMULATED_STEPS)
            self.reader = heldout_reader(recipe)
            rows = first_rows(self.reader, recipe, progress.num_samples)
            shapes = [tuple(self.reader.latent_shapes[row].tolist()) for row in rows]
            prompts = [Prompt(n, int(r), s) for n, (r, s) in enumerate(zip(rows, shapes, strict=True))]
            self.prompts = sorted(prompts, key=lambda prompt: prompt.shape)

    def on_train_start(self, trainer, module):
        """Loaded before the first step, so that an autoencoder that does not fit stops a run at once."""
        folder = self.recipe.progress.autoencoder
        if not (self.recipe.progress.samples_every and folder and _is_first_of_copy()):
            return
        from nemo_moviegen.training.autoencoder_weights import load_autoencoder

        self.autoencoder = load_autoencoder(folder)
        channels = self.autoencoder.size.latent_channels
        if channels != self.recipe.size.output_channels:
            raise ValueError(
                f"{self.recipe.name} makes latents of {self.recipe.size.output_channels} channels, the "
                f"autoencoder in {folder} takes {channels}: set progress.autoencoder to the one that encoded "
                f"{self.recipe.data.folder}"
            )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values = {}
        every, step = self.recipe.progress.samples_every, trainer.global_step
        if every and (step % every == 0 or step == self.recipe.num_steps):
            float(outputs["loss"])  # the step is over on the GPU too: its seconds are not ours
            started = time.perf_counter()
            self.sample(module, Path(self.recipe.output, SAMPLES_FOLDER, f"step={step}"))
            torch.distributed.all_reduce(torch.zeros(1, device=torch.cuda.current_device()))  # others decode
            self.values["samples/seconds"] = time.perf_counter() - started

    @torch.no_grad()
    def sample(self, module, folder):
        """Write what the model makes of each prompt to `folder`; collective."""
        if not hasattr(self, "text"):
            self.text = text_of(self.reader, self.recipe, self.data)
        for own, weights in shares(
            self.prompts,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            self.recipe.micro_batch,
        ):
            samples = self.text.read([prompt.row for prompt in own])
            latent_BTCHW = self.latents(module, samples)
            if self.autoencoder is not None:  # on the device for as long as it decodes
                self.autoencoder.to(latent_BTCHW.device)
            for prompt, sample, latent_TCHW, weight in zip(own, samples, latent_BTCHW, weights, strict=True):
                if weight and _is_first_of_copy():
                    self._show(folder, prompt, sample, latent_TCHW.float().cpu())
            if self.autoencoder is not None:
                self.autoencoder.to("cpu")
        if module.module.ddp_config.use_megatron_fsdp:
            module.module.module.synchronize_param_gather()  # frees what was gathered, shards in its place

    def latents(self, module, samples):
        """Normalised latents [B, T, C, H, W] that the model makes of the prompts of held-out samples."""
        unprompted = [replace(sample, contexts=self.text.empty_prompt) for sample in samples]
        (prompt, shape), (empty, _) = (self._conditions(module, some) for some in (samples, unprompted))
        noise_BTCHW = flow.draw_noise(
            (shape[0], self.recipe.size.output_channels, *shape[1:]),
            self.recipe.seed,
            [sample.sample_id for sample in samples],
            [0] * len(samples),
            module.data_dtype,
            purpose="fixed prompt noise",
        ).to(torch.cuda.current_device())

        def velocity(x_BTCHW, t_B, contexts, masks):
            tokens_SBX = gather_tokens(module.module(x_BTCHW, t_B, contexts, masks), module.config)
            return unpatchify(tokens_SBX, shape, self.recipe.size)

        scale = self.recipe.guidance_scale
        with without_fp8(module.config):
            return sample_latents(
                velocity,
                noise_BTCHW,
                prompt,
                empty,
                schedule=self.schedule,
                guidance_scale=scale,
                step=step_of(self.recipe.objective),
            )

    def _conditions(self, module, samples):
        """((contexts, masks), latent shape) as training sees prompts, all padded to the same length."""
        batch = collate(
            samples,
            [0] * len(samples),
            self.recipe.size.contexts,
            pad="max",
            token_limits=self.recipe.data.token_limits,
        ).to(torch.cuda.current_device(), module.data_dtype)
        frames, _, height, width = batch.latent_BTCHW.shape[1:]
        return (batch.contexts, batch.masks), (frames, height, width)

    def _show(self, folder, prompt, sample, latent_TCHW):
        """Files of one sample. A picture that can not be made is said once and stops no training."""
        try:
            name, kept = f"{prompt.number:03d}", []
            num_frames, frames = self.frames(latent_TCHW)
            passing = keeping(frames, pick_frames(num_frames, STRIP_FRAMES), kept)
            if self.autoencoder is not None and num_frames > 1:
                stream_mp4(passing, folder / f"{name}.mp4", sample.fps)
            else:
                list(passing)
            _replace(folder / f"{name}.png", lambda part: write_png(strip(torch.stack(kept)), part))
            facts = {
                "prompt": sample.caption,
                "sample_id": sample.sample_id,
                "latent_shape": list(prompt.shape),
                "shows": _LATENT if self.autoencoder is None else _DECODED,
            }
            _replace(folder / f"{name}.json", lambda part: part.write_text(json.dumps(facts) + "\n"))
        except (OSError, ValueError, RuntimeError) as error:
            if not self.told:
                self.told = True
                what = f"no picture of {folder.name}, prompt {prompt.number}"
                print(f"{self.recipe.name}: {what}: {error}", flush=True)

    def frames(self, latent_TCHW):
        """How many frames a latent has, and they, chunks [t, 3, H, W] in [-1, 1] on the CPU.

        Without an autoencoder its first three channels are the colours of its own frames.
        """
        if self.autoencoder is None:
            channels = [min(c, latent_TCHW.shape[1] - 1) for c in range(3)]
            return len(latent_TCHW), [(latent_TCHW[:, channels] / 3).clamp(-1, 1)]  # three deviations
        compression = self.autoencoder.size.temporal_compression
        num_frames = 1 if len(latent_TCHW) == 1 else compression * len(latent_TCHW)
        mean_C, std_C = (torch.as_tensor(numbers).float() for numbers in self.reader.statistics)
        return num_frames, decode(self.autoencoder, latent_TCHW, mean_C, std_C, num_frames)


def strip(frames_TCHW):
    """[3, H, W] of frames side by side, at most STRIP_PX high."""
    height, width = frames_TCHW.shape[2:]
    if height > STRIP_PX:
        size = (STRIP_PX, max(1, round(width * STRIP_PX / height)))
        frames_TCHW = torch.nn.functional.interpolate(frames_TCHW, size=size, mode="area")
    return torch.cat(list(frames_TCHW), dim=2)


def _is_first_of_copy():
    """Whether this rank speaks for its copy of the model: all ranks of one hold the same samples."""
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return ranks == (0, 0)


def _replace(path, write):
    """A file that is whole as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    write(part)
    os.replace(part, path)
