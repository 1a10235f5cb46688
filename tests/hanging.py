"""A rank of two that trains in name only: after three steps rank 1 does not come back.

    python -m nemo_moviegen.node --standalone --nproc-per-node=2 tests/hanging.py OUTPUT HOW

HOW: loop (it goes round in Python), gather (it waits for itself in a system call), or none (it ends well).
"""

import os
import sys
import threading
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from nemo_moviegen.training.heartbeat import Heartbeat

HANG_MINUTES = 0.05


def goes_round_for_good():
    while True:
        time.sleep(0.01)


def waits_for_itself():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def main(output, how):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    heartbeat = Heartbeat(SimpleNamespace(output=output, hang_minutes=HANG_MINUTES))
    trainer, module = SimpleNamespace(global_step=0), SimpleNamespace()
    heartbeat.setup(trainer, module, "fit")
    for step in range(1, 6):
        heartbeat.on_train_batch_start(trainer, module, None, 0)
        if step == 4 and rank == 1 and how != "none":
            {"loop": goes_round_for_good, "gather": waits_for_itself}[how]()
        dist.all_reduce(torch.ones(1))
        time.sleep(0.3)
        trainer.global_step = step
        heartbeat.on_train_batch_end(trainer, module, None, None, 0)
    heartbeat.on_train_end(trainer, module)
    heartbeat.teardown(trainer, module, "fit")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(*sys.argv[1:])
