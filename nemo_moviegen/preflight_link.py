"""One rank of the all-reduce that preflight.py starts on a node; the first prints what it reached as JSON."""

import json
import os
import time

import torch
import torch.distributed as dist

ROUNDS = 5
PRODUCTS = 300
"""On a GPU: half a second, in which its clock settles."""


def main():
    """Sum a tensor over the ranks a few times; bus bandwidth is 2 (n - 1) / n of its bytes a second."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device, num_bytes = ("cuda", 2**30) if on_gpu else ("cpu", 2**24)
    mine = torch.tensor([multiply_tflops(device)], device=device)
    values, ranks, seconds = torch.ones(num_bytes // 4, device=device), dist.get_world_size(), []
    tflops = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(tflops, mine)
    for _ in range(ROUNDS + 1):
        values.fill_(1.0)
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(values)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    if not bool((values == ranks).all()):
        raise SystemExit("the sum over the ranks is wrong")
    gbyte_s = 2 * (ranks - 1) / ranks * num_bytes / min(seconds[1:]) / 1e9
    if dist.get_rank() == 0:
        facts = {"on_gpu": on_gpu, "cuda": torch.version.cuda, "tflops": [float(t) for t in tflops]}
        print(json.dumps({"gbyte_s": gbyte_s, "ranks": ranks, **facts}), flush=True)
    dist.destroy_process_group()


def multiply_tflops(device) -> float:
    """TFLOP/s of this rank in products of square matrices: bf16 on a GPU, small ones in fp32 on a CPU."""
    on_gpu = device == "cuda"
    width, products, dtype = (8192, PRODUCTS, torch.bfloat16) if on_gpu else (256, 20, torch.float32)
    left, right = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    out = left @ right  # the first chooses kernels
    for count in (products, products):  # clocks settle in the first
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            torch.matmul(left, right, out=out)
        if on_gpu:
            torch.cuda.synchronize()
    return 2 * width**3 * products / (time.perf_counter() - begun) / 1e12


if __name__ == "__main__":
    main()
