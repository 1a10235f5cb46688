"""Lets megatron-core 0.15.3 and NeMo 2.7.3 run without CUDA.

`stand_in_for_cuda()` does nothing where CUDA exists. Elsewhere it makes the few CUDA names that both
libraries use without asking answer for the CPU. Each patch below says who needs it. What is patched on all
machines: strategy.py keeps NeMo's language models out, alone.py serves a rank slice.
"""

import contextlib
import functools
import inspect
import textwrap
from types import SimpleNamespace

import torch
import torch.utils._device as torch_devices

CPU = torch.device("cpu")


def stand_in_for_cuda():
    """Patch once a process, before the first model is built; machines with CUDA are left as they are."""
    if torch.cuda.is_available() or getattr(torch.cuda, "moviegen_stand_in", False):
        return
    torch.cuda.moviegen_stand_in = True
    _patch_device_names()
    _patch_streams()
    _patch_random_state()
    _patch_adam()
    _patch_main_precision()
    _patch_fsdp()


def stand_in_for_cuda_in_nemo():
    """The same for NeMo, once it is imported."""
    if getattr(torch.cuda, "moviegen_stand_in", False):
        import nemo.lightning.io.pl as nemo_io

        nemo_io._fix_tensors_device = lambda checkpoint: checkpoint  # asserts an initialised CUDA


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW that keeps one step count a parameter group, as TE's and Apex's FusedAdam do.

    megatron-core 0.15.3 falls back to torch.optim.AdamW, whose step count is a tensor in every parameter's
    state: the distributed optimizer shards each state tensor like its parameter and fails on a scalar.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group, params):
        (beta1, beta2), step = group["betas"], torch.tensor(float(group["step"]))
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        # one pass over memory, as the fused kernels on GPUs; of a DTensor (Megatron FSDP) this rank's piece
        tensors = (
            [getattr(tensor, "_local_tensor", tensor) for tensor in of_params]
            for of_params in (
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
            )
        )
        torch._fused_adamw_(
            *tensors,
            [],
            [step] * len(params),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _patch_device_names():
    # `with torch.device("meta")` remembers torch's factories at its first use: let it be these
    torch_devices._device_constructors()
    # megatron schedules.py, clip_grads.py, optimizer.py, exchange_utils.py: factory calls with device="cuda";
    # NeMo: pin_memory=True
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    # mappings.py, layers.py, param_and_grad_buffer.py: buffers on torch.cuda.current_device(); Megatron FSDP
    # writes it into a string, f"cuda:{current_device()}", so it is a number
    torch.cuda.current_device = lambda: 0
    # NeMo's megatron_strategy.py logs through .to("cuda"); megatron's optimizer restores states with .cuda()
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: to(
        self, *map(_cpu, args), **{k: _cpu(v) for k, v in kwargs.items()}
    )
    torch.Tensor.cuda = lambda self, *_, **__: self
    # distrib_optimizer.py and optimizer.py compare type() with torch.cuda.FloatTensor and its bf16 sister.
    # They know no fp64: it is treated as fp32 is, optimised in place (the parity tests run in fp64).
    kind = torch.Tensor.type
    torch.Tensor.type = lambda self, *args, **kwargs: (
        kind(self, *args, **kwargs)
        if args or kwargs
        else kind(self).replace("torch.", "torch.cuda.").replace("Double", "Float")
    )


def _patch_streams():
    class Event:
        """Megatron FSDP waits for what a stream has recorded; here it has already happened."""

        def wait(self, *_): ...

    class Stream:
        """megatron's DDP and NeMo's MegatronParallel make side streams."""

        def __init__(self, *_, **__): ...
        def wait_stream(self, *_): ...
        def wait_event(self, *_): ...
        def synchronize(self): ...
        def record_event(self, *_):
            return Event()

    torch.cuda.Stream = Stream
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_, **__: Stream()
    torch.cuda.synchronize = lambda *_, **__: None  # megatron's checkpoint writer
    torch.cuda.empty_cache = lambda: None  # NeMo's load_checkpoint


def _patch_random_state():
    import megatron.core.tensor_parallel.random as megatron_random

    # random.py: the tracker that sequence parallelism and initialisation fork
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    # A CUDA build of torch on a machine without GPU: Lightning sets PYTORCH_NVML_BASED_CUDA_CHECK, then
    # is_available() is device_count() > 0; megatron's checkpoint reader divides by device_count().
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_available = lambda: False


def _patch_adam():
    import megatron.core.optimizer as megatron_optimizer
    import megatron.core.optimizer.distrib_optimizer as sharded_optimizer

    # GroupStepAdamW keeps its state as Apex's Adam does, so both files take the way they take with Apex
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    sharded_optimizer.HAVE_APEX_OR_TE = sharded_optimizer.USING_APEX_OPTIMIZER = True
    megatron_optimizer.Adam = sharded_optimizer.Adam = GroupStepAdamW


def _patch_main_precision():
    """Megatron's optimizers say fp32 where they mean full precision: fp64 stays fp64 (parity tests)."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as sharded_optimizer
    import megatron.core.optimizer.optimizer as plain_optimizer

    # The norm of all gradients, which scales them: megatron's fallback for the CUDA kernel rounds it to fp32
    clip_grads.l2_norm_impl = _norm_of_all
    # and its fallback for the scaling makes a copy of each gradient
    clip_grads.multi_tensor_scale_impl = _scale_all
    # A rank without a gradient of its own (all of them are another tensor rank's duplicates) would bring an
    # fp32 zero to the sum of the ranks' norms
    norm = plain_optimizer.get_grad_norm_fp32
    plain_optimizer.get_grad_norm_fp32 = lambda grads, *args, **kwargs: norm(
        grads or [torch.zeros(1)], *args, **kwargs
    )
    # The distributed optimizer hands its slices of the gradients over with .float()
    owner = sharded_optimizer.DistributedOptimizer
    owner._copy_model_grads_to_main_grads = _keeping_doubles(owner._copy_model_grads_to_main_grads)


def _norm_of_all(chunk_size, noop_flag, tensor_lists, per_tensor):
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]])
    return torch.linalg.vector_norm(norms, dtype=torch.float64).reshape(1), None


def _scale_all(chunk_size, noop_flag, tensor_lists, factor):
    gradients, into = tensor_lists
    if any(a is not b for a, b in zip(gradients, into, strict=True)):
        raise RuntimeError("megatron-core 0.15.3 scales gradients in place, and this caller does not")
    torch._foreach_mul_(gradients, factor)


def _keeping_doubles(method):
    @functools.wraps(method)
    def keep(*args, **kwargs):
        as_float = torch.Tensor.float
        torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else as_float(self)
        try:
            return method(*args, **kwargs)
        finally:
            torch.Tensor.float = as_float

    return keep


def _patch_fsdp():
    """Megatron FSDP of megatron-core 0.15.3: a mesh of CPUs, and fp64 for the parity tests."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as buffers
    from torch.distributed import DeviceMesh

    # mcore_fsdp_adapter.py asks for a mesh of "cuda" devices
    from_group = DeviceMesh.from_group
    DeviceMesh.from_group = staticmethod(
        lambda group, device_type, *args, **kwargs: from_group(
            group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs
        )
    )
    # Gathered weights arrive while other buckets' storages are freed and made again. On a GPU the stream
    # keeps the two apart; with gloo's threads nothing does, and the heap broke after some hundred steps.
    gather = buffers._coalescing_manager

    @contextlib.contextmanager
    def gather_now(group, device=None, async_ops=False):
        with gather(group, device):
            yield SimpleNamespace(wait=lambda: None)

    buffers._coalescing_manager = gather_now
    # The tables of buffers list fp32, fp16, bf16 and fp8
    buffers._dtype_size = lambda dtype: dtype.itemsize
    owner, name = buffers.ParamAndGradBuffer, "_init_each_parameter_group_buffers"
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    for old, new in (
        ("buffer_size = {torch.float32", "buffer_size = {torch.float64: 0, torch.float32"),
        ("self.buffer_all_in_one = True", "self.buffer_all_in_one = False"),
    ):
        if source.count(old) != 1:
            raise RuntimeError(f"{owner.__name__}.{name} is not megatron-core 0.15.3's: {old!r} is not there")
        source = source.replace(old, new)
    patched = {}
    exec(compile(source, inspect.getfile(owner), "exec"), vars(buffers), patched)
    setattr(owner, name, patched[name])


def _cpu(value):
    if isinstance(value, int) and not isinstance(value, bool):
        return CPU
    is_cuda = isinstance(value, str) and value.startswith("cuda")
    is_cuda = is_cuda or (isinstance(value, torch.device) and value.type == "cuda")
    return CPU if is_cuda else value


def _with_cpu_device(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return factory(*args, **kwargs)

    return on_cpu
