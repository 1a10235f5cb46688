"""fp8.jsonl of a run: what the FP8 linears of the first rank see, every `fp8.report_every` steps.

    {"step": 200, "linears": {"decoder.layers.0.mlp.linear_fc1": {"input": {"largest": 9.1, "cut_off": 0.0,
    "to_zero": 0.002}, "weight": {...}, "gradient": {...}}, ...}}

`largest` is of the absolute values. `cut_off` is the share of values beyond what the format holds at their
scale: only delayed scaling, whose scale is of earlier steps, has any. `to_zero` is the share of values,
zeros aside, that round to zero. Both are of this rank's tensors, the most of the step's micro-batches.
"""

import json
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_moviegen.recipe import FP8_FILE
from nemo_moviegen.training.record import open_after
from nemo_moviegen.training.shards import unwrapped
from nemo_moviegen.video.fp8_emulated import FORMATS, Scaling

_ALARMING = 1e-3
"""Share of cut off values that is said on the terminal."""


class Fp8Report(pl.Callback):
    """Writes the file above; looks at the tensors of due steps only."""

    def __init__(self, recipe):
        self.recipe, self.hooks, self.found = recipe, [], {}

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero and self.recipe.fp8.report_every:
            open_after(Path(self.recipe.output, FP8_FILE), trainer.global_step).close()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        every = self.recipe.fp8.report_every
        if every and (trainer.global_step + 1) % every == 0 and trainer.is_global_zero:
            self.found = {}
            for name, linear in fp8_linears(module.module):
                self.hooks.append(linear.register_forward_hook(self._watch(name)))

    def _watch(self, name):
        def seen(linear, inputs, output):
            out = output[0] if isinstance(output, tuple) else output
            self._note(name, linear, "input", inputs[0])
            self._note(name, linear, "weight", linear.weight)
            if out.requires_grad:
                out.register_hook(lambda grad: self._note(name, linear, "gradient", grad))

        return seen

    @torch.no_grad()
    def _note(self, name, linear, operand, tensor):
        facts = facts_of(tensor, operand, _scale(linear, operand, tensor, self.recipe.precision))
        known = self.found.setdefault(name, {}).setdefault(operand, facts)
        for key, value in facts.items():
            known[key] = max(known[key], value)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        line = {"step": trainer.global_step, "linears": self.found}
        with Path(self.recipe.output, FP8_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        rows = [(f["cut_off"], name, operand) for name, of in self.found.items() for operand, f in of.items()]
        share, name, operand = max(rows, default=(0.0, "", ""))
        if share > _ALARMING:
            print(
                f"{self.recipe.name} step {trainer.global_step}: FP8 cuts off {share:.2%} of the {operand} "
                f"of {name} (see {FP8_FILE}); precision=fp8_current would not",
                flush=True,
            )


def fp8_linears(model):
    """(name, module) of the linears of a `VideoTransformer` that multiply in FP8, emulated or real."""
    model = unwrapped(model)
    kept = model.config.num_layers_at_start_in_bf16 if model.config.first_last_layers_bf16 else 0
    last = model.config.num_layers - kept
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            yield name, module
        elif hasattr(module, "fp8_meta") and hasattr(module, "weight") and module.weight.dim() == 2:
            layer = name.split(".")[2] if name.startswith("decoder.layers.") else str(kept)
            if kept <= int(layer) < last:
                yield name, module


def facts_of(tensor, operand, scale) -> dict:
    """largest, cut_off and to_zero of a tensor at its scale, which has its last two axes or one value."""
    x_RK = tensor.detach().flatten(0, -2).float()
    kind = FORMATS[operand]
    limit, scaled = torch.finfo(kind).max, x_RK * scale
    nonzero = scaled != 0
    lost = nonzero & (scaled.clamp(-limit, limit).to(kind).float() == 0)
    return {
        "largest": x_RK.abs().max().item(),
        # what lies within half a step of the largest rounds down to it
        "cut_off": (scaled.abs() > limit * (1 + 2.0**-4)).float().mean().item(),
        "to_zero": (lost.sum() / nonzero.sum().clamp(min=1)).item(),
    }


def _scale(linear, operand, tensor, precision):
    """Of Transformer Engine's delayed scaling, what it has; of the others, what they work out."""
    if precision == "fp8_delayed" and not hasattr(linear, "scaling"):
        meta = linear.fp8_meta["scaling_bwd" if operand == "gradient" else "scaling_fwd"]
        return meta.scale[1 if operand == "weight" else 0]
    scaling = getattr(linear, "scaling", None) or Scaling(precision)
    return scaling.scale_of(tensor.detach().flatten(0, -2).float(), operand)
