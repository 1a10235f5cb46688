"""What NeMo and Megatron FSDP need where a process is one of many ranks and the others are not there
(bench/rank_slice.py)."""

import contextlib

import lightning.pytorch as pl


class MakesGroups(pl.Callback):
    """NeMo makes no groups of megatron's where the ranks are there already."""

    def setup(self, trainer, module, stage):
        from nemo.lightning._strategy_lib import init_model_parallel

        init_model_parallel()


@contextlib.contextmanager
def pieces_unchecked():
    """Megatron FSDP of megatron-core 0.15.3 asks all ranks where their pieces of a weight lie; ranks that
    repeat what this one says have none that fit."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as buffers

    check, buffers.validate_uneven_dtensor = buffers.validate_uneven_dtensor, lambda dtensor: None
    try:
        yield
    finally:
        buffers.validate_uneven_dtensor = check
