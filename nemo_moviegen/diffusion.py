"""v-prediction diffusion with zero terminal SNR: what flow matching is compared with (s3.6.2, Table 8).

In the time of `flow.py`: t = 0 is noise, t = 1 is data, X_t = signal(t) X1 + sqrt(1 - signal(t)^2) X0. The
signal is that of latent diffusion's scaled-linear betas, in the limit of many steps, shifted and scaled as
Lin et al. (arXiv 2305.08891) do, so that nothing of the data is left at t = 0. The model learns
v = signal X0 - noise X1, at times drawn evenly, and DDIM samples. The paper names the objective and no
numbers: the schedule is our default.
"""

import torch

from nemo_moviegen import flow

FIRST_BETA, LAST_BETA, NUM_STEPS = 0.00085, 0.012, 1000
"""Of latent diffusion, whose square roots rise evenly over the steps."""


def signal(t_B) -> torch.Tensor:
    """Share of the data in X_t, fp64: 0 at t = 0 and 1 at t = 1."""
    s_B = 1 - t_B.double()  # diffusion counts from data to noise
    kept_B = _kept(s_B)
    last = _kept(torch.ones((), dtype=torch.float64, device=t_B.device))
    return (kept_B - last) / (1 - last)


def draw_time(seed, sample_ids, epochs, dtype=torch.float32) -> torch.Tensor:
    """t_B even in [0, 1) on the CPU, a function of (seed, sample, epoch) as `flow.draw_time`."""
    keys = zip(sample_ids, epochs, strict=True)
    generators = (flow.sample_generator(seed, *key, "time") for key in keys)
    return torch.tensor([generator.random() for generator in generators], dtype=torch.float64).to(dtype)


def noisy_pair(noise_BTCHW, data_BTCHW, t_B) -> tuple[torch.Tensor, torch.Tensor]:
    """(X_t, v) in the dtype of the data. ValueError if shapes differ or there is not one time a sample."""
    flow.check_pair(noise_BTCHW, data_BTCHW, t_B)
    of_data, of_noise = _shares(t_B, data_BTCHW)
    x_BTCHW = of_data * data_BTCHW + of_noise * noise_BTCHW
    return x_BTCHW, of_data * noise_BTCHW - of_noise * data_BTCHW


def ddim_step(velocity_fn, x_BTCHW, t, t_next) -> torch.Tensor:
    """x at t_next from x at t by deterministic DDIM; `velocity_fn` gives v. t and t_next are floats."""
    v_BTCHW = flow.velocity_at(velocity_fn, x_BTCHW, t)
    of_data, of_noise = _shares(torch.tensor([t], dtype=torch.float64), x_BTCHW)
    data_BTCHW = of_data * x_BTCHW - of_noise * v_BTCHW
    noise_BTCHW = of_noise * x_BTCHW + of_data * v_BTCHW
    of_data, of_noise = _shares(torch.tensor([t_next], dtype=torch.float64), x_BTCHW)
    return of_data * data_BTCHW + of_noise * noise_BTCHW


def _shares(t_B, like_BTCHW):
    """(share of the data, share of the noise) at each time, to multiply [B, T, C, H, W] by."""
    signal_B = signal(t_B)
    noise_B = (1 - signal_B.square()).clamp(min=0).sqrt()
    shape = (-1, *[1] * (like_BTCHW.dim() - 1))
    return tuple(share.to(like_BTCHW).reshape(shape) for share in (signal_B, noise_B))


def _kept(s_B):
    """Root of the product of (1 - beta) over the first share `s_B` of the steps: its limit for many."""
    low, rise = FIRST_BETA**0.5, LAST_BETA**0.5 - FIRST_BETA**0.5
    integral_B = ((low + rise * s_B) ** 3 - low**3) / (3 * rise)
    return torch.exp(-NUM_STEPS * integral_B / 2)
