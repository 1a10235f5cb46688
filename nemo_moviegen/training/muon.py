"""Muon (Jordan et al. 2024) for convolutions and matrices, AdamW for the rest, as one optimiser.

The momentum of a weight, as a matrix [outputs, inputs x taps], is replaced by the nearest orthogonal one, so
every direction of it learns at one pace. Scaled to the size AdamW's steps have (Liu et al. 2025), both take
one learning rate. Why not `torch.optim.Muon`: it takes matrices only, and rounds to bfloat16, which turns the
last digit in which two layouts differ into the third.

Overfitting a film (recipes/tae.py) it was 1 dB ahead of AdamW after 140 steps.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al.: singular values in (0, 1] end between 0.7 and 1.2 after five steps."""


class Muon(torch.optim.Optimizer):
    """Matrices are parameters of two dimensions and more, with more than three inputs and outputs."""

    def __init__(self, parameters, lr, *, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, momentum=0.95):
        matrices, others = split(parameters)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            gradients = [parameter.grad for parameter in trained]
            states = [self.state[parameter] for parameter in trained]
            updates = (_muon if group["matrices"] else _adam)(gradients, states, group)
            for parameter, update in zip(trained, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"])


def split(parameters) -> tuple[list, list]:
    """(matrices, the others): biases and norms have no matrix, nor have weights from or to three colours."""
    matrices, others = [], []
    for parameter in parameters:
        is_matrix = parameter.dim() >= 2 and min(parameter.shape[:2]) > 3
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def orthogonal(matrices_NOI: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of each matrix U S V^T, in its own precision, without decomposing it (Newton-Schulz)."""
    tall = matrices_NOI.shape[-2] > matrices_NOI.shape[-1]
    x = matrices_NOI.mT if tall else matrices_NOI
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _muon(gradients, states, group):
    """Updates of matrices; those of one shape together: most of the time of a small one is its calls."""
    for gradient, state in zip(gradients, states, strict=True):
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
    momenta = [state["momentum"] for state in states]
    torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
    ahead = [gradient.flatten(1) for gradient in ahead]
    alike, updates = defaultdict(list), [None] * len(ahead)
    for number, matrix_OI in enumerate(ahead):
        alike[matrix_OI.shape].append(number)
    for shape, numbers in alike.items():
        size = 0.2 * max(shape) ** 0.5  # the root mean square of AdamW's updates
        made_NOI = size * orthogonal(torch.stack([ahead[number] for number in numbers]))
        for number, made_OI in zip(numbers, made_NOI, strict=True):
            updates[number] = made_OI.view_as(gradients[number])
    return updates


def _adam(gradients, states, group):
    """Updates of the rest: many, and small, so none has a call of its own."""
    for gradient, state in zip(gradients, states, strict=True):
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(gradient)}
            state["square"] = torch.zeros_like(gradient)
        state["step"] += 1
    (beta1, beta2), eps = group["betas"], group["eps"]
    means, squares = ([state[name] for state in states] for name in ("mean", "square"))
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - beta2)
    steps = [float(state["step"]) for state in states]
    roots = torch._foreach_sqrt(torch._foreach_div(squares, [1 - beta2**step for step in steps]))
    torch._foreach_add_(roots, eps)
    return torch._foreach_div(torch._foreach_div(means, [1 - beta1**step for step in steps]), roots)


def optimizer_of(network: nn.Module, optim):
    """The optimiser that a recipe's `Optim` asks for."""
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[optim.kind]
    return kind(
        network.parameters(),
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
