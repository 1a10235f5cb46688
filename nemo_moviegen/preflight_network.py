"""One rank of the exchange between the nodes of a job that preflight.py starts; the first judges all.

Neighbours in a ring of nodes send to each other, a rank to the one of its number, pairs of a round at once:

    four nodes    0-1  2-3  then  1-2  3-0

A node counts by its better neighbour, so that a sick one is named and not who happened to stand beside it; of
two nodes both are. Ranks report through the store that torchrun made, which a dead card does not hold up.
"""

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_moviegen.cluster import read_cluster
from nemo_moviegen.heartbeat import node_name

REPEATS = 5
DEADLINE_SECONDS = 120.0
"""From the moment that all ranks are there; connecting takes most of it."""
NETWORK_SHARE = 0.6
"""Of the cluster's network_gbit_s, by one rank while all send: good cards reach 0.9, a wrong route half."""
MOST_SKEW_SECONDS = 5.0
"""Between a node's clock and the others': heartbeats are compared. A second of it is what busy ranks lose."""


def main():
    """Take part; rank 0 prints {"faults": [...], "gbit_s": the slowest node's} as JSON."""
    cluster = read_cluster(sys.argv[1])
    rank, local, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    store = _store()
    if store.add("ready", 1) == world:
        store.set("go", "1")
    store.wait(["go"], timedelta(seconds=DEADLINE_SECONDS))
    store.set(f"here/{rank}", json.dumps([node_name(), time.time()]))
    end = threading.Thread(
        target=_judge if rank == 0 else _wait_for_verdict, args=(cluster, world), daemon=True
    )
    end.start()
    with contextlib.suppress(
        RuntimeError
    ):  # a fault of the network, which the first rank sees by what is missing
        for number, gbit_s in enumerate(_rates(store, rank, local, world, cluster.ranks_per_node)):
            store.set(f"rate/{rank}/{number}", str(gbit_s))
    end.join()


def rounds(num_nodes) -> list[list[tuple[int, int]]]:
    """Pairs of nodes, by rounds in which a node is once; it has two neighbours in all, if there are."""
    pairs = [(node, node + 1) for node in range(num_nodes - 1)]
    closing = [(num_nodes - 1, 0)]
    if num_nodes < 3:
        return [pairs]
    return [pairs[::2], pairs[1::2] + closing] if num_nodes % 2 == 0 else [pairs[::2], pairs[1::2], closing]


def network_faults(here, rates, cluster) -> tuple[list[str], float]:
    """(faults, Gbit/s of the slowest node) of all ranks' reports; nodes have `ranks_per_node` ranks in a row.

    `here` has (node's name, its clock when all started) a rank, `rates` Gbit/s by (rank, round); one that is
    missing has not ended.
    """
    faults, reached, per_node = [], {}, cluster.ranks_per_node
    names = [here[rank][0] for rank in range(0, len(here), per_node)]
    clocks = [here[rank][1] for rank in range(0, len(here), per_node)]
    usual = statistics.median(clocks)
    for name, clock in zip(names, clocks, strict=True):
        if abs(clock - usual) > MOST_SKEW_SECONDS:
            way = "ahead of" if clock > usual else "behind"
            faults.append(
                f"{name}: its clock is {abs(clock - usual):.0f} s {way} the other nodes': set it by NTP"
            )
    for number, pairs in enumerate(rounds(len(names))):
        for node in (node for pair in pairs for node in pair):
            ranks = range(node * per_node, (node + 1) * per_node)
            slowest = min(ranks, key=lambda rank: rates.get((rank, number), 0.0))
            found = (rates.get((slowest, number), 0.0), slowest % per_node)
            reached[node] = max(reached.get(node, found), found)
    needed = NETWORK_SHARE * cluster.network_gbit_s
    for node, (gbit_s, local) in sorted(reached.items()):
        if not gbit_s:
            faults.append(
                f"{names[node]}: rank {local} of it and those of other nodes do not reach each other within "
                f"{DEADLINE_SECONDS:.0f} s"
            )
        elif gbit_s < needed:
            faults.append(
                f"{names[node]}: rank {local} of it exchanges {gbit_s:.3g} Gbit/s with those of other nodes, "
                f"{needed:.3g} are needed"
            )
    return faults, min(gbit_s for gbit_s, _ in reached.values())


def _rates(store, rank, local, world, per_node):
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    limit = timedelta(seconds=DEADLINE_SECONDS)
    in_store = dist.PrefixStore("exchange", store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=in_store, rank=rank, world_size=world, timeout=limit
    )
    device, num_bytes = ("cuda", 2**28) if on_gpu else ("cpu", 2**22)
    sent, received = torch.ones(num_bytes // 4, device=device), torch.empty(num_bytes // 4, device=device)
    for pairs in rounds(world // per_node):
        pair = next((pair for pair in pairs if rank // per_node in pair), None)
        if pair is None:
            yield 0.0  # an odd one sits this round out
            continue
        is_first = rank // per_node == pair[0]
        peer = pair[1 if is_first else 0] * per_node + local
        yield 2 * 8 * num_bytes / _exchange_seconds(sent, received, peer, is_first, on_gpu) / 1e9


def _exchange_seconds(sent, received, peer, is_first, on_gpu):
    """The least that there and back takes, the first time aside: it connects."""
    seconds = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        for sends in (is_first, not is_first):
            dist.send(sent, peer) if sends else dist.recv(received, peer)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def _judge(cluster, world):
    """In a thread of the first rank, with a connection of its own: the exchange may never end."""
    store, ends = _store(), time.monotonic() + DEADLINE_SECONDS
    here = [json.loads(store.get(f"here/{rank}")) for rank in range(world)]
    missing = {
        (rank, number)
        for number, pairs in enumerate(rounds(world // cluster.ranks_per_node))
        for node in (node for pair in pairs for node in pair)
        for rank in range(node * cluster.ranks_per_node, (node + 1) * cluster.ranks_per_node)
    }
    rates = {}
    while missing and time.monotonic() < ends:
        for rank, number in sorted(missing):
            if store.check([key := f"rate/{rank}/{number}"]):
                rates[rank, number] = float(store.get(key))
        missing -= rates.keys()
        time.sleep(0.05 if missing else 0)
    faults, gbit_s = network_faults(here, rates, cluster)
    print(json.dumps({"faults": faults, "gbit_s": gbit_s}), flush=True)
    store.set("verdict", "1")
    os._exit(0)  # the store is the launcher's, which waits for those of other nodes


def _wait_for_verdict(cluster, world):
    store, ends = _store(), time.monotonic() + 2 * DEADLINE_SECONDS
    while not store.check(["verdict"]) and time.monotonic() < ends:
        time.sleep(0.2)
    os._exit(0)


def _store():
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=DEADLINE_SECONDS)))
    return store


if __name__ == "__main__":
    main()
