"""One rank of a layout on one device: `moviegen bench RECIPE --rank-slice`.

The run is the recipe's own and believes itself to be the first of all its ranks. Its process groups are
echoes: what other ranks would send is what this one sends. So shapes, kernels, memory and the optimiser's
piece are those of the layout, keys and values of all context ranks are attended to, and nothing travels: a
collective costs the copies it would make in this device's memory. Values are finite and mean nothing.
"""

import contextlib
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.profiler import record_function

from nemo_moviegen.launch import check_run
from nemo_moviegen.utilisation import utilisation

NOT_MEASURED = (
    "communication: nothing travelled between tensor, context and data-parallel ranks; its row has the "
    "copies in this device's memory that stand for it"
)
"""What a slice leaves out, beside the layers it does not have."""
_AROUND_LAYERS = ("embeddings", "other")
"""Components that more layers do not lengthen."""
_BACKEND = "echo"
_ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",  # nobody listens, nobody asks
    "TORCHELASTIC_RUN_ID": "rank-slice",
}


def slice_of(recipe, cluster, num_layers=0):
    """The recipe with `num_layers` of its layers (0: all); every rank of the cluster has such a share.

    ValueError where layout or batch do not divide, a rank's memory is too small for the slice, or there are
    not so many layers.
    """
    have = recipe.size.num_layers
    if not 0 <= num_layers <= have:
        raise ValueError(f"--layers {num_layers}: {recipe.name} has {have} layers, use 1 to {have}")
    if num_layers:
        size = replace(recipe.size, num_layers=num_layers)
        fp8 = replace(recipe.fp8, bf16_layers=min(recipe.fp8.bf16_layers, num_layers // 2))
        recipe = replace(recipe, size=size, fp8=fp8)
    check_run(recipe, cluster)
    return recipe


def check_here(recipe, cluster):
    """ValueError where this machine has no accelerator and the cluster has: its share would take days."""
    if cluster.accelerator != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"{recipe.name} on {cluster.name} runs on {cluster.accelerator} GPUs, and this machine has none: "
            "bench the slice on one such GPU, or name a cluster of CPUs with --cluster"
        )


@contextlib.contextmanager
def first_of(num_ranks):
    """This process as the first of `num_ranks` ranks, the others of which are not there: gives the callbacks
    that `training.run.train` has to take along."""
    from nemo_moviegen.training.alone import MakesGroups, pieces_unchecked

    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT, WORLD_SIZE=str(num_ranks))
    if not hasattr(dist.Backend, _BACKEND.upper()):
        dist.Backend.register_backend(_BACKEND, _made, devices=["cpu", "cuda"])
    dist.init_process_group(_BACKEND, rank=0, world_size=num_ranks, store=dist.HashStore())
    try:
        with pieces_unchecked():
            yield [MakesGroups()]
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def facts_of(found, plan, num_layers) -> dict:
    """What is to be known of a slice beside `bench.recipe.found_of`; `plan` is of the model with all layers.

    A step of all layers is no measurement: it takes what is not around the layers as often as there are more.
    """
    more = num_layers / found["layers"]
    seconds = sum(
        row["seconds"] * (1 if name in _AROUND_LAYERS else more) for name, row in found["components"].items()
    )
    flops = (plan.iterations[0].model_flops, plan.iterations[0].recomputed_flops)
    peak = found["ceiling"]["tflops"] * found["ceiling"]["is_published"]
    used = utilisation(*flops, seconds, plan.num_ranks, peak)
    return {
        "not_measured": NOT_MEASURED,
        "of_layers": num_layers,
        "step_seconds_of_all": seconds,
        "mfu_of_all": used.get("speed/mfu"),
    }


def told(facts, layers):
    """Lines for a terminal of `facts_of` a slice of so many layers."""
    yield f"one rank alone, the first of the layout. Not measured: {facts['not_measured']}"
    if layers < facts["of_layers"]:
        mfu = f", MFU {facts['mfu_of_all']:.1%}" if facts["mfu_of_all"] else ""
        seconds = facts["step_seconds_of_all"]
        yield f"not measured either, all {facts['of_layers']} layers by these: {seconds:.3f} s{mfu}"


def _made(store, rank, num_ranks, timeout):
    return _Echo(rank, num_ranks)


class _Done(dist._Work):
    """Of a collective that ended before it was asked for."""

    def __init__(self, result):
        super().__init__()
        self._future = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout=None):
        return True

    def is_completed(self):
        return True

    def get_future(self):
        return self._future


class _Echo(dist.ProcessGroup):
    """A process group whose other ranks say what this one says. Sums are this rank's part alone: added as
    often as there are ranks, activations would grow from layer to layer."""

    def __init__(self, rank, num_ranks):
        super().__init__(rank, num_ranks)
        self._num_ranks, self._sent = num_ranks, []

    def size(self):
        return self._num_ranks

    @property
    def group_name(self):
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self):
        return _BACKEND

    def allreduce(self, tensors, opts=None):
        return _Done(tensors)

    allreduce_coalesced = broadcast = reduce = allreduce

    def barrier(self, opts=None):
        return _Done([])

    def allgather(self, outputs, inputs, opts=None):
        for of_ranks, own in zip(outputs, inputs, strict=True):
            _fill(of_ranks, own)
        return _Done(outputs)

    def gather(self, outputs, inputs, opts=None):
        return self.allgather(outputs, inputs)

    def all_gather_single(self, output, own, opts=None):
        _fill(output.view(self._num_ranks, *own.shape), own)
        return _Done([output])

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own)
        return _Done(outputs)

    def reduce_scatter(self, outputs, inputs, opts=None):
        for output, to_ranks in zip(outputs, inputs, strict=True):
            _fill([output], to_ranks[self.rank()])
        return _Done(outputs)

    def scatter(self, outputs, inputs, opts=None):
        return self.reduce_scatter(outputs, inputs)

    def reduce_scatter_single(self, output, whole, opts=None):
        _fill([output], whole.view(self._num_ranks, *output.shape)[self.rank()])
        return _Done([output])

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=None):
        for output, whole in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, whole)
        return _Done(outputs)

    def all_to_all_single(self, output, own, output_splits, input_splits, opts=None):
        _fill([output], own.view(output.shape))
        return _Done([output])

    def alltoall(self, outputs, inputs, opts=None):
        for output, own in zip(outputs, inputs, strict=True):
            _fill([output], own)
        return _Done(outputs)

    def send(self, tensors, destination, tag=0):
        self._sent = tensors
        return _Done(tensors)

    def recv(self, tensors, source, tag=0):
        for tensor, sent in zip(tensors, self._sent, strict=True):
            _fill([tensor], sent)
        return _Done(tensors)

    # torch's names before 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _fill(outputs, own):
    with record_function(_BACKEND + "::copy"):
        for output in outputs:
            if output.data_ptr() != own.data_ptr():  # megatron gathers weights in place
                output.copy_(own)
