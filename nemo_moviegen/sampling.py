"""From noise to frames (Movie Gen s3.4): what `generate` and the samples of a training run share.

Axis letters: B clips, T frames, C channels, H W height and width. t = 0 is noise, t = 1 is data.
"""

from dataclasses import dataclass

import torch

from nemo_moviegen import flow
from nemo_moviegen.training_objective import OBJECTIVES

METHODS = tuple(name for objective in OBJECTIVES.values() for name in objective.steps)
SCHEDULES = ("linear-quadratic", "linear")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How noise becomes a latent: the paper's way by default (s3.4)."""

    method: str = ""
    """euler, the paper's choice for video; midpoint, for audio: second order, the model is called twice a
    step (s3.4, s6.1.4); ddim, of a model trained by v-prediction; "" = as the model was trained."""
    schedule: str = "linear-quadratic"
    """linear-quadratic: half of the steps are the first of `emulated_steps` even ones, the rest reach the
    data on a parabola. linear: even steps."""
    num_steps: int = 50
    emulated_steps: int = 250
    """N of the linear-quadratic schedule; of no effect with the linear one."""
    guidance_scale: float | None = None
    """Of classifier-free guidance; None = the recipe's. 1 is the prompt without guidance, 0 no prompt."""
    negative_prompt: str = ""
    """What samples move away from, in place of the empty prompt; the same for all of them."""
    seed: int = 0
    """Sample number n starts from noise that is a function of (seed, n)."""
    batch_size: int = 4
    """Prompts sampled at once by one copy of the model; changes no sample."""

    def __post_init__(self):
        for name, known in (("method", ("", *METHODS)), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(filter(None, known))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use 1 or more")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 1000:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}; use a number from 0, for example the paper's 7.5"
            )
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError(
                "guidance_scale is 1, which leaves the negative prompt "
                f"{self.negative_prompt[:40]!r} out: use a larger one"
            )
        self.times()

    def times(self) -> torch.Tensor:
        """float64 [num_steps + 1] from 0 to 1; ValueError for steps that make no schedule."""
        if self.schedule == "linear":
            return flow.linear_schedule(self.num_steps)
        return flow.linear_quadratic_schedule(self.num_steps, self.emulated_steps)

    def told(self) -> str:
        """In words, as in `linear-quadratic, 50 Euler steps emulating 250`."""
        name = {"": "Euler", "euler": "Euler", "ddim": "DDIM"}.get(self.method, self.method)
        emulating = f" emulating {self.emulated_steps}" if self.schedule == "linear-quadratic" else ""
        return f"{self.schedule}, {self.num_steps} {name} steps{emulating}"


def method_of(objective, method="") -> str:
    """The method, "" being that of the objective (a recipe's word); ValueError for another objective's."""
    steps = OBJECTIVES[objective].steps
    if method and method not in steps:
        raise ValueError(
            f"method is {method}, and the model was trained by {objective}: use {' or '.join(steps)}"
        )
    return method or next(iter(steps))


def step_of(objective, method=""):
    """The function that takes a step of `method_of`."""
    return OBJECTIVES[objective].steps[method_of(objective, method)]


def sample_latents(
    velocity, noise_BTCHW, prompt, empty, *, schedule, guidance_scale, step=flow.euler_step, progress=None
):
    """From noise (t = 0) to data (t = 1) with classifier-free guidance (s3.4); returns x_BTCHW.

    `prompt` and `empty` are (contexts, masks) of `pad_contexts`; both halves go through
    `velocity(x_BTCHW, t_B, contexts, masks)` as one batch, the prompted half first.
    """
    batch = len(noise_BTCHW)
    contexts, masks = (
        tuple(torch.cat(pair) for pair in zip(*both, strict=True)) for both in zip(prompt, empty, strict=True)
    )

    def guided(x_BTCHW, t_B):
        t_B = t_B.double()  # as in training: Megatron rounds fp32 arguments to bf16
        both = velocity(torch.cat([x_BTCHW, x_BTCHW]), torch.cat([t_B, t_B]), contexts, masks)
        return flow.guide(both[:batch], both[batch:], guidance_scale)

    return flow.sample(guided, noise_BTCHW, schedule, step=step, progress=progress)


def decode(autoencoder, latent_TCHW, mean_C, std_C, num_frames, tiling=None, group=None):
    """Frames of a normalised latent, [t, 3, H, W] in [-1, 1] on the CPU, a few at a time.

    With a process `group` its ranks share the tiles; all of them take all frames.
    """
    from nemo_moviegen.tae.tiling import Tiling, decode_frames

    raw_TCHW = latent_TCHW.float() * std_C.view(1, -1, 1, 1) + mean_C.view(1, -1, 1, 1)
    device = next(autoencoder.parameters()).device
    raw_BTCHW = raw_TCHW[None].to(device)
    for frames_BTCHW in decode_frames(autoencoder, raw_BTCHW, num_frames, tiling or Tiling(), group):
        yield frames_BTCHW[0].clamp(-1, 1).cpu()


def keeping(chunks, numbers, kept):
    """The chunks; the frames of these numbers are appended to `kept` as they pass."""
    start = 0
    for chunk in chunks:
        kept += [chunk[n - start].clone() for n in numbers if start <= n < start + len(chunk)]
        start += len(chunk)
        yield chunk
