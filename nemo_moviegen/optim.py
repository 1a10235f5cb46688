"""How weights are stepped: the optimiser's settings, and a learning rate that follows the validation loss.

The paper states the learning rates of its stages (Table 3) and, of 768 px, that the loss on unseen videos
fell for about 10k iterations, that the rate was halved at 19.6k, and lowered whenever that loss stopped
falling (s3.2). What "stopped" means is our default. Plain numbers, without torch.
"""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """When and how far `optim.decay=plateau` lowers the learning rate; counted in measurements, those of
    every `validation.every` steps."""

    factor: float = 0.5
    """What the rate is multiplied by: the paper's first step is a half."""
    patience: int = 5
    """Measurements in a row without an improvement that lower the rate."""
    threshold: float = 0.001
    """Share of the best loss by which a loss must be lower to count as an improvement."""
    cooldown: int = 2
    """Measurements after a lowering that do not count as bad: the loss jumps when the rate changes."""
    floor: float = 0.1
    """Share of `optim.learning_rate` below which the rate never falls; Table 3's ends at a sixth."""

    def __post_init__(self):
        if not 0 < self.factor < 1:
            raise ValueError(f"optim.plateau.factor is {self.factor}; use a number above 0 and below 1")
        if not 0 < self.floor <= 1:
            raise ValueError(f"optim.plateau.floor is {self.floor}; use a share above 0, at most 1")
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"optim.plateau.threshold is {self.threshold}; it is a share, use 0 or more and less than 1"
            )
        for name, least in (("patience", 1), ("cooldown", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"optim.plateau.{name} is {getattr(self, name)}; use {least} or more")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser. The paper states only the learning rates (Table 3); the rest is our default."""

    learning_rate: float
    kind: str = "adamw"
    """adamw; or muon, for autoencoders only: megatron's optimisers have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Largest norm of the gradient over all parameters."""
    warmup_steps: int = 2000
    """Linear from zero; constant afterwards, or as `decay` says."""
    decay: str = "constant"
    """constant; cosine (to a tenth of the peak at the last step); or plateau: lowered where the validation
    loss stops falling, for transformers only."""
    plateau: Plateau = field(default_factory=Plateau)

    def __post_init__(self):
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optim.kind is {self.kind!r}; use adamw or muon")
        if self.decay not in ("constant", "cosine", "plateau"):
            raise ValueError(f"optim.decay is {self.decay!r}; use constant, cosine or plateau")
        for name in ("learning_rate", "eps", "clip_grad"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"optim.{name} is {getattr(self, name)}; use a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; use 0 or more and less than 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0 and self.warmup_steps >= 0):
            raise ValueError(
                f"optim.weight_decay {self.weight_decay} and optim.warmup_steps {self.warmup_steps} "
                "must not be negative"
            )


class PlateauDetector:
    """Lowers the rate by one measurement after the other; who sees the same losses lowers it alike."""

    def __init__(self, plateau):
        self.plateau = plateau
        self.lowered = 0
        """How often the rate was lowered."""
        self.best = math.inf
        self._bad = self._cooling = 0

    @property
    def factor(self) -> float:
        """Share of the rate that is left, in [floor, 1]."""
        return max(self.plateau.factor**self.lowered, self.plateau.floor)

    def observe(self, loss) -> bool:
        """Take in a measured validation loss; True where it lowers the rate.

        A loss that is no finite number is no improvement.
        """
        improves = math.isfinite(loss) and loss < self.best * (1 - self.plateau.threshold)
        if improves:
            self.best, self._bad = loss, 0
        if self._cooling:
            self._cooling -= 1
            return False
        if improves:
            return False
        self._bad += 1
        if self._bad < self.plateau.patience or self.factor <= self.plateau.floor:
            return False
        self.lowered += 1
        self._bad, self._cooling = 0, self.plateau.cooldown
        return True

    def state(self) -> dict:
        """What decides about the next measurements, as JSON can hold it."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "counts": [self.lowered, self._bad, self._cooling]}

    def load_state(self, state):
        """Go on as the detector would that `state()` was asked of, or afresh from {}."""
        best = state.get("best")
        self.best = math.inf if best is None else best
        self.lowered, self._bad, self._cooling = state.get("counts", [0, 0, 0])
