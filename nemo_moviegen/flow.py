"""Flow matching (Movie Gen s3.1.2) and its sampling (s3.4). t = 0 is noise, t = 1 is data.

The path is X_t = t X1 + (1 - (1 - sigma_min) t) X0 with Gaussian X0 and data X1, so its velocity
dX_t/dt = X1 - (1 - sigma_min) X0 does not depend on t. At t = 0 nothing of the data is left: zero
terminal SNR by construction.

Every random number of training belongs to a sample, not to a rank: it is a function of (seed, sample
id, epoch, purpose), drawn for the whole latent before anything is split. So it is the same for every
parallel layout, after a resume, and for every dtype of the model.

Axes: B clips, T latent frames, C channels, H W height and width.
"""

import hashlib
import itertools
import math

import numpy as np
import torch

SIGMA_MIN = 1e-5  # s3.1.2


def sample_generator(seed, sample_id, epoch, purpose) -> np.random.Generator:
    """Philox keyed by all four; `purpose` is a word such as "noise", "time" or "prompt_drop".

    Counter-based: number k of a stream is a function of the key and of k, so streams share no state and can
    be drawn in any order, by any thread. The key is a 128-bit hash, so no two samples get one stream: of 32
    bits, which is what torch's CPU generator takes, a million pairs in 100M samples would. numpy promises
    Philox's bits for ever and what it makes of them for a version, so an upgrade may change what a resumed
    run draws; a test tells.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, sample_id, epoch, purpose)))


def draw_noise(shape_TCHW, seed, sample_ids, epochs, dtype=torch.float32, purpose="noise") -> torch.Tensor:
    """Standard normal noise_BTCHW on the CPU, one whole latent for each (sample id, epoch).

    Drawn in float64 and rounded to `dtype`, so it is the same number in every precision. Nearly every value
    is one product of an integer and a constant (ziggurat), the same on every kind of CPU. A latent of 73,728
    tokens takes 60 ms of one core: 0.6% of a step of 10 s. ValueError if there is not one epoch a sample.
    """
    keys = _sample_keys(sample_ids, epochs)
    noise_BTCHW = torch.empty(len(keys), *shape_TCHW, dtype=dtype)
    for row, generator in enumerate(_sample_generators(seed, keys, purpose)):
        noise_BTCHW[row] = torch.from_numpy(generator.standard_normal(tuple(shape_TCHW)))
    return noise_BTCHW


def draw_time(seed, sample_ids, epochs, dtype=torch.float32) -> torch.Tensor:
    """Logit-normal t_B in (0, 1) on the CPU: the sigmoid of a standard normal (s3.1.2, as SD3).

    A multiple of 2**-32: the last digits of an exponential differ between machines. Ask for float32 or
    float64: bfloat16 has 256 steps below one and may round up to it.
    """
    generators = _sample_generators(seed, _sample_keys(sample_ids, epochs), "time")
    logits = (generator.standard_normal() for generator in generators)
    times = [round(2**32 / (1 + math.exp(-logit))) / 2**32 for logit in logits]
    return torch.tensor(times, dtype=torch.float64).to(dtype)


def interpolate(noise_BTCHW, data_BTCHW, t_B) -> torch.Tensor:
    """x_t_BTCHW on the path: the noise at t = 0, the data (plus 1e-5 of the noise) at t = 1.

    In the widest dtype of the three. ValueError if the shapes differ.
    """
    check_pair(noise_BTCHW, data_BTCHW, t_B)
    t = t_B.reshape(-1, *[1] * (data_BTCHW.dim() - 1))
    return t * data_BTCHW + (1 - (1 - SIGMA_MIN) * t) * noise_BTCHW


def velocity_target(noise_BTCHW, data_BTCHW) -> torch.Tensor:
    """dX_t/dt, the same at every t (s3.1.2): what the model learns. ValueError if the shapes differ."""
    check_pair(noise_BTCHW, data_BTCHW)
    return data_BTCHW - (1 - SIGMA_MIN) * noise_BTCHW


def noisy_pair(noise_BTCHW, data_BTCHW, t_B) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, velocity target) of `interpolate` and `velocity_target`, in the dtype of the data."""
    x_BTCHW = interpolate(noise_BTCHW, data_BTCHW, t_B.to(data_BTCHW.dtype))
    return x_BTCHW, velocity_target(noise_BTCHW, data_BTCHW)


def linear_schedule(num_steps) -> torch.Tensor:
    """float64 [num_steps + 1], even from 0 (noise) to 1 (data)."""
    if num_steps < 1:
        raise ValueError(f"a schedule of {num_steps} steps never leaves the noise: use 1 step or more")
    return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps


def linear_quadratic_schedule(num_steps=50, emulated_steps=250) -> torch.Tensor:
    """float64 [num_steps + 1] from 0 to 1 in place of `emulated_steps` even ones (s3.4).

    The first half takes the first steps of the long linear schedule, the second half reaches 1 on a
    parabola that starts with the same slope. The paper prints no formula for it; this one is the C1
    match. ValueError if fewer steps are emulated than taken.
    """
    if not 1 <= num_steps <= emulated_steps:
        raise ValueError(
            f"{num_steps} steps cannot emulate {emulated_steps}: use between 1 and {emulated_steps} steps, "
            "or raise emulated_steps"
        )
    num_linear = num_steps // 2
    num_quadratic = num_steps - num_linear
    curvature = (1 - num_steps / emulated_steps) / num_quadratic**2
    linear = torch.arange(num_linear, dtype=torch.float64) / emulated_steps
    j = torch.arange(num_quadratic + 1, dtype=torch.float64)
    quadratic = num_linear / emulated_steps + j / emulated_steps + curvature * j**2
    quadratic[-1] = 1.0  # exactly; the sum above may miss it by one rounding
    return torch.cat([linear, quadratic])


def euler_step(velocity_fn, x_BTCHW, t, t_next) -> torch.Tensor:
    """x at t_next from x at t, with one velocity: the paper's choice (s3.4). t and t_next are floats."""
    return x_BTCHW + (t_next - t) * velocity_at(velocity_fn, x_BTCHW, t)


def midpoint_step(velocity_fn, x_BTCHW, t, t_next) -> torch.Tensor:
    """x at t_next from x at t, with the velocity half-way: second order, two model calls a step."""
    middle = (t + t_next) / 2
    x_middle = x_BTCHW + (middle - t) * velocity_at(velocity_fn, x_BTCHW, t)
    return x_BTCHW + (t_next - t) * velocity_at(velocity_fn, x_middle, middle)


def guide(conditional, unconditional, scale) -> torch.Tensor:
    """Classifier-free guidance (s3.4): scale 0 is `unconditional`, 1 exactly `conditional`."""
    return conditional + (scale - 1) * (conditional - unconditional)


@torch.no_grad()
def sample(velocity_fn, noise_BTCHW, schedule, step=euler_step, progress=None) -> torch.Tensor:
    """x_BTCHW at the end of `schedule`, integrated from the noise in the noise's dtype.

    `velocity_fn(x_BTCHW, t_B)` returns the velocity, t_B being float32 (float64 beside float64 noise).
    `progress` wraps the list of (t, t_next), for example `rich.progress.track`. ValueError if the
    schedule does not rise from 0 to 1: t = 0 is noise.
    """
    times = [float(t) for t in schedule]
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or any(a >= b for a, b in itertools.pairwise(times)):
        raise ValueError(
            f"the schedule {times} does not rise from 0 (noise) to 1 (data): use linear_schedule(num_steps)"
        )
    x_BTCHW = noise_BTCHW
    intervals = list(itertools.pairwise(times))
    for t, t_next in intervals if progress is None else progress(intervals):
        x_BTCHW = step(velocity_fn, x_BTCHW, t, t_next)
    return x_BTCHW


def velocity_at(velocity_fn, x_BTCHW, t) -> torch.Tensor:
    """What `velocity_fn(x_BTCHW, t_B)` gives at one time, a float, in the dtype of x."""
    dtype = (
        torch.float64 if x_BTCHW.dtype == torch.float64 else torch.float32
    )  # bfloat16 cannot tell 0.1 from 0.1004
    t_B = torch.full((x_BTCHW.shape[0],), t, dtype=dtype, device=x_BTCHW.device)
    return velocity_fn(x_BTCHW, t_B).to(x_BTCHW.dtype)


def _key(seed, sample_id, epoch, purpose):
    key = f"{int(seed)}/{int(sample_id)}/{int(epoch)}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")


def _sample_generators(seed, keys, purpose):
    """`sample_generator` of each (sample id, epoch), to be used before the next is taken: one, set anew.

    A fresh one asks the system for entropy that its key replaces, 15 microseconds that the loader's thread
    takes from the one that trains.
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    state = generator.bit_generator.state
    for key in keys:
        number = _key(seed, *key, purpose)
        state["state"]["key"][:] = number % 2**64, number >> 64
        generator.bit_generator.state = state
        yield generator


def _sample_keys(sample_ids, epochs):
    sample_ids, epochs = [[int(n) for n in numbers] for numbers in (sample_ids, epochs)]
    if len(sample_ids) != len(epochs) or not sample_ids:
        raise ValueError(
            f"{len(sample_ids)} sample ids with {len(epochs)} epochs: pass one epoch for each sample"
        )
    return list(zip(sample_ids, epochs, strict=True))


def check_pair(noise, data, t_B=None):
    """ValueError if noise and data have two shapes, or there is not one time a sample."""
    if noise.shape != data.shape:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} with data of shape {tuple(data.shape)}: "
            "draw the noise with the latent's (T, C, H, W)"
        )
    if t_B is not None and t_B.shape != data.shape[:1]:
        raise ValueError(f"{tuple(t_B.shape)} times for {data.shape[0]} samples: pass one time a sample, t_B")
