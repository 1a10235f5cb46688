"""Generators and defaults of the whole process: what a draw that belongs to a sample must not read."""

import contextlib
import random

import numpy as np
import torch


@contextlib.contextmanager
def other_global_state(number):
    """Each of them set to something else; at the end they must be as they were set, nothing drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.get_default_dtype()
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    torch.set_default_dtype(torch.float64 if number % 2 else torch.float32)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    try:
        yield
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
        assert (np.random.get_state()[1] == before[1]).all()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_default_dtype(states[3])
