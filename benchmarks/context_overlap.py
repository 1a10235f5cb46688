"""Does it pay to gather keys and values behind attention? Two gloo ranks, one thread each.

    PYTHONPATH=.:tests python benchmarks/context_overlap.py > benchmarks/context_overlap.json

Times forward + backward of self-attention over two context ranks with its heads in 1 group (every collective
is waited for), 2 and 4 groups, beside what the kernels take without traffic and the traffic without kernels.
The variants take turns, in another order each round: a round's ratios share its load. The seconds of the
processor tell what a variant costs also where other work slows the clock's.
"""

import json
import statistics
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_on_ranks

from nemo_moviegen.video import attention
from nemo_moviegen.video.parallel import start_gather_tokens, start_sum_to_owners

RANKS, HEADS, HEAD_WIDTH = 2, 8, 32
ROUNDS = {2048: 20, 8192: 5}
"""Tokens of the clip, and how often each variant is timed."""


def rounds(num_tokens, num_rounds):
    """[{variant: (seconds, seconds of the processor) of the slower rank}]; the first round is not counted."""
    parallel_state.initialize_model_parallel(context_parallel_size=RANKS)
    torch.manual_seed(dist.get_rank())
    shape = (num_tokens // RANKS, 1, HEADS, HEAD_WIDTH)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    whole = [torch.randn(num_tokens, *shape[1:], requires_grad=True) for _ in range(2)]
    variants = {
        f"{groups} groups": lambda groups=groups: split(groups, query, key, value) for groups in (1, 2, 4)
    }
    variants["attention alone"] = lambda: attention._attend(query, *whole).sum().backward()
    variants["traffic alone"] = lambda: traffic(key, value, whole)
    names, timed = list(variants), []
    for index in range(num_rounds + 1):
        turns = names[index % len(names) :] + names[: index % len(names)]
        taken = {name: seconds(variants[name]) for name in turns}
        timed.append({name: taken[name] for name in names})
    return timed[1:]


def split(groups, query, key, value):
    attention.HEAD_GROUPS = groups
    attention.ContextAttention.apply(query, key, value, False, True).sum().backward()


@torch.no_grad()
def traffic(key, value, whole):
    start_gather_tokens(torch.cat((key, value), dim=-1)).wait()
    start_sum_to_owners(torch.cat(whole, dim=-1)).wait()


def seconds(run):
    """By the clock and of the processor, each of the slower rank, from a common start."""
    dist.barrier()
    start = (time.perf_counter(), time.process_time())
    run()
    taken = torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]])
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return [round(x, 4) for x in taken.tolist()]


def summary(timed, kind):
    """Medians over rounds of each variant's seconds, and of their ratio to one group's in that round."""
    return {
        name: {
            "seconds": statistics.median(r[name][kind] for r in timed),
            "ratio": round(statistics.median(r[name][kind] / r["1 groups"][kind] for r in timed), 3),
        }
        for name in timed[0]
    }


def main():
    result = {
        "ranks": RANKS,
        "heads": HEADS,
        "head_width": HEAD_WIDTH,
        "dtype": "fp32",
        "torch": torch.__version__,
    }
    for num_tokens, num_rounds in ROUNDS.items():
        timed = run_on_ranks(rounds, num_tokens, num_rounds, world_size=RANKS, timeout_seconds=600)[0]
        result[f"{num_tokens} tokens"] = {
            "clock": summary(timed, 0),
            "processor": summary(timed, 1),
            "rounds": timed,
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
