"""What a video model learns, by the name a recipe gives it: flow matching, or what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

from nemo_moviegen import diffusion, flow


@dataclass(frozen=True)
class Objective:
    """How noise and data become an example, and how the trained model makes samples."""

    draw_time: Callable
    """(seed, sample ids, epochs, dtype) -> t_B, 0 being noise."""
    noisy_pair: Callable
    """(noise, data, t_B) -> (x_t, target), of [B, T, C, H, W]."""
    steps: dict[str, Callable]
    """Ways of taking a step of sampling, by name; the first unless another is asked for."""


OBJECTIVES = {
    "flow_matching": Objective(
        flow.draw_time, flow.noisy_pair, {"euler": flow.euler_step, "midpoint": flow.midpoint_step}
    ),
    "v_prediction": Objective(diffusion.draw_time, diffusion.noisy_pair, {"ddim": diffusion.ddim_step}),
}
