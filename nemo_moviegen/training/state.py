"""The training state of one rank: weights, moments and EMA as shards, to and from a checkpoint folder."""

import torch

from nemo_moviegen.training.shards import init_moments, own_shards, unwrapped
from nemo_moviegen.training.storage import Piece, read_into, tensor_shapes

WEIGHTS, EMA = "weights", "ema"


class TrainingState:
    """What a run would lose if it were killed, beside its step number; shared out like the optimiser.

    `chunk` is the wrapped model (DDP or Megatron FSDP), `optimizer` megatron's. With `ema_decay` above 0 an
    exponential moving average of the full-precision weights is kept beside them, cut like them.
    """

    def __init__(self, chunk, optimizer, ema_decay=0.0):
        (self.optimizer,) = getattr(optimizer, "chained_optimizers", [optimizer])
        self.chunk, self.ema_decay = chunk, ema_decay
        self.model = unwrapped(chunk)
        self._weights = [shard.weight for shard in self.shards()]
        self._ema = [weight.clone() for weight in self._weights] if ema_decay else []
        self._averaged_steps = 0

    def shards(self):
        """This rank's `Shard`s; moments appear with the first step."""
        return own_shards(self.model, self.optimizer)

    @torch.no_grad()
    def update_ema(self):
        """Take in the weights after a step of the optimiser, its n-th; a skipped step changes nothing.

        The decay is min(ema_decay, (1 + n) / (10 + n)): the average soon forgets the fresh weights.
        """
        n = self.optimizer_steps
        if self._ema and n > self._averaged_steps:
            torch._foreach_lerp_(self._ema, self._weights, 1 - min(self.ema_decay, (1 + n) / (10 + n)))
        self._averaged_steps = n

    def start_ema(self):
        """Start the average at the present weights."""
        if self._ema:
            torch._foreach_copy_(self._ema, self._weights)

    def tensors(self, replica=None):
        """({"kind.name": flat tensor}, {"kind.name": Shard}) of this rank; `replica` 0: those it saves."""
        tensors, owners = {}, {}
        averages = dict(zip((s.data_ptr() for s in self._weights), self._ema, strict=False))
        for shard in self.shards():
            if replica is not None and shard.replica != replica:
                continue
            kinds = {WEIGHTS: shard.weight, **shard.moments}
            if self._ema:
                kinds[EMA] = averages[shard.weight.data_ptr()]
            for kind, tensor in kinds.items():
                tensors[f"{kind}.{shard.name}"], owners[f"{kind}.{shard.name}"] = tensor, shard
        return tensors, owners

    @property
    def optimizer_steps(self):
        """Steps the optimiser has taken; skipped ones do not count."""
        return max((int(group.get("step", 0)) for group in self._groups()), default=0)

    def read(self, folder, optimizer_steps):
        """Weights, moments and EMA from a checkpoint's folder of tensors, whichever layout wrote it.

        An average that the checkpoint does not have starts at its weights.
        """
        init_moments(self.optimizer)
        tensors, owners = self.tensors()
        has_ema = any(name.startswith(f"{EMA}.") for name in tensor_shapes(folder))
        wanted = {n: t for n, t in tensors.items() if has_ema or not n.startswith(f"{EMA}.")}
        self._refresh(lambda: read_into(folder, pieces(wanted, owners)))
        if not has_ema:
            self.start_ema()
        for group in self._groups():
            group["step"] = optimizer_steps
        self._averaged_steps = optimizer_steps

    def read_weights(self, read):
        """Weights alone: `read(pieces)` fills them. Moments stay fresh, the EMA starts at them."""
        tensors, owners = self.tensors()
        weights = {n: t for n, t in tensors.items() if n.startswith(f"{WEIGHTS}.")}
        self._refresh(lambda: read(pieces(weights, owners)))
        self.start_ema()

    def _refresh(self, fill):
        """Change the optimiser's weights by `fill()`, then the model's."""
        is_fsdp = self.chunk.ddp_config.use_megatron_fsdp
        if is_fsdp:
            self.chunk.module.synchronize_param_gather()  # forgets what was gathered of the old weights
        with torch.no_grad():
            fill()
        if hasattr(self.optimizer, "_copy_main_params_to_model_params"):
            self.optimizer._copy_main_params_to_model_params()
        if self.chunk.ddp_config.use_distributed_optimizer and not is_fsdp:
            self.chunk.start_param_sync(force_sync=True)

    def _groups(self):
        return self.optimizer.optimizer.param_groups


def pieces(tensors, owners):
    """{name: [Piece]} of flat tensors by name, for storage; `owners` as from `TrainingState.tensors`."""
    return {
        name: [
            Piece(offset, owners[name].part.whole_shape, view)
            for offset, view in owners[name].rectangles(tensor)
        ]
        for name, tensor in tensors.items()
    }
