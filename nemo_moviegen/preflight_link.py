"""One rank of the all-reduce that preflight.py starts on a node; the first prints what it reached as JSON."""

import json
import os
import time

import torch
import torch.distributed as dist

ROUNDS = 5


def main():
    """Sum a tensor over the ranks a few times; bus bandwidth is 2 (n - 1) / n of its bytes a second."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device, num_bytes = ("cuda", 2**30) if on_gpu else ("cpu", 2**24)
    values, ranks, seconds = torch.ones(num_bytes // 4, device=device), dist.get_world_size(), []
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
        print(json.dumps({"gbyte_s": gbyte_s, "ranks": ranks}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
