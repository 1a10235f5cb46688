"""The generator behind all random numbers: functions of (seed, sample id, epoch, purpose), noise and time."""

import hashlib
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from global_state import other_global_state
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen import flow

CASES = settings(derandomize=True, deadline=None, max_examples=50)
SHAPE = (2, 4, 8, 4)  # frames, channels, height, width
KEY = {"seed": 3, "sample_id": 5, "epoch": 1, "purpose": "noise"}
OTHER_KEYS = [KEY | part for part in ({"seed": 4}, {"sample_id": 6}, {"epoch": 2}, {"purpose": "time"})]
SIGMAS = 5  # chance of a false alarm: one in two million


def philox(key, counter):
    """Four 64-bit numbers of Philox 4x64-10 (Salmon et al. 2011), in plain integers."""
    words, half = [counter >> 64 * n & 2**64 - 1 for n in range(4)], 2**64 - 1
    keys = [key & half, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (second >> 64) ^ words[1] ^ keys[0],
            second & half,
            (first >> 64) ^ words[3] ^ keys[1],
            first & half,
        ]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & half, (keys[1] + 0xBB67AE8584CAA73B) & half]
    return words


def bits(seed, sample_id, epoch, purpose):
    """The stream of a key, four numbers a count, from the first."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}/{epoch}/{purpose}".encode(), digest_size=16).digest()
    for counter in itertools.count(1):
        yield from philox(int.from_bytes(digest, "little"), counter)


@CASES
@given(
    seed=st.integers(0, 2**31),
    sample_id=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    purpose=st.sampled_from(["noise", "time", "prompt_drop"]),
)
def test_a_stream_is_philox_of_the_hashed_key(seed, sample_id, epoch, purpose):
    drawn = flow.sample_generator(seed, sample_id, epoch, purpose).random(9)
    stream = itertools.islice(bits(seed, sample_id, epoch, purpose), 9)
    assert drawn.tolist() == [(number >> 11) * 2.0**-53 for number in stream]


def test_a_normal_is_a_product_of_its_bits_and_a_constant_in_this_numpy_as_in_the_one_a_run_began_with():
    """Ziggurat of 256 layers (Marsaglia, Tsang 2000) for the 99 in 100 draws its first comparison accepts."""
    last, area = 3.6541528853610088, 0.00492867323399
    density = [math.exp(-(last**2) / 2)]
    edges = [last]
    while len(edges) < 255:
        density.append(area / edges[-1] + density[-1])
        edges.append(math.sqrt(-2 * math.log(density[-1])))
    edges = [area / math.exp(-(last**2) / 2), *reversed(edges)]
    inner = [last, 0.0, *edges[1:-1]]
    accepted = 0
    for sample_id in range(400):
        number = next(bits(0, sample_id, 0, "noise"))
        layer, sign, size = number & 255, number >> 8 & 1, (number >> 9 & 2**52 - 1) / 2**52
        if size * edges[layer] < inner[layer]:
            drawn = flow.sample_generator(0, sample_id, 0, "noise").standard_normal()
            assert drawn == pytest.approx((1 - 2 * sign) * size * edges[layer], rel=1e-9)
            accepted += 1
    assert accepted > 380


def test_keys_whose_hashes_agree_in_32_bits_have_streams_of_their_own():
    """Pairs found among 200,000 keys: a 4-byte digest, and the first 4 of 16 bytes."""
    pairs = [
        ((3, 395, 3, "noise"), (3, 687, 3, "time"), 4),
        ((0, 3649, 2, "noise"), (2, 325, 1, "noise"), 16),
    ]
    for *keys, digest_size in pairs:
        texts = ["/".join(map(str, key)).encode() for key in keys]
        assert len({hashlib.blake2b(text, digest_size=digest_size).digest()[:4] for text in texts}) == 1
        assert len({flow.sample_generator(*key).bit_generator.random_raw() for key in keys}) == 2


def correlation(first, second):
    """In standard errors of independent draws."""
    return abs(np.corrcoef(first, second)[0, 1]) * math.sqrt(len(first))


@pytest.mark.parametrize("other", OTHER_KEYS, ids=lambda key: "-".join(str(part) for part in key.values()))
def test_streams_of_two_keys_are_independent(other):
    first, second = (flow.sample_generator(**key).standard_normal(100_000) for key in (KEY, other))
    assert correlation(first, second) < SIGMAS
    assert correlation(first**2, second**2) < SIGMAS
    assert correlation(first[1:], second[:-1]) < SIGMAS


def test_what_neighbouring_samples_epochs_and_purposes_draw_first_is_independent():
    count = 4000
    drawn = {
        (epoch, purpose): [flow.sample_generator(0, n, epoch, purpose).random() for n in range(count)]
        for epoch in (0, 1)
        for purpose in ("noise", "time", "prompt_drop")
    }
    for first, second in itertools.combinations(drawn, 2):
        assert correlation(drawn[first], drawn[second]) < SIGMAS
    for values in drawn.values():
        assert correlation(values[1:], values[:-1]) < SIGMAS
        assert abs(np.mean(values) - 0.5) * math.sqrt(12 * count) < SIGMAS


@CASES
@given(
    keys=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**31),
)
def test_noise_and_time_do_not_depend_on_call_order_batch_or_global_state(keys, order, seed):
    alone = {
        key: (flow.draw_noise(SHAPE, seed, *key_of(key)), flow.draw_time(seed, *key_of(key))) for key in keys
    }
    shuffled = order.sample(keys, len(keys))
    with other_global_state(order.randrange(1000)):
        times = flow.draw_time(seed, *zip(*shuffled, strict=True))
        noise = flow.draw_noise(SHAPE, seed, *zip(*shuffled, strict=True))
    for row, key in enumerate(shuffled):
        assert torch.equal(noise[row], alone[key][0][0]) and torch.equal(times[row], alone[key][1][0])


def key_of(key):
    return [key[0]], [key[1]]


def checksum(sample_id):
    key = [sample_id], [2]
    noise, time = flow.draw_noise(SHAPE, 1, *key), flow.draw_time(1, *key, torch.float64)
    drop = flow.sample_generator(1, sample_id, 2, "prompt_drop").random()
    return hashlib.sha256(noise.numpy().tobytes() + time.numpy().tobytes() + repr(drop).encode()).hexdigest()


def test_threads_that_draw_at_once_draw_what_one_draws():
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(checksum, range(200))) == [checksum(n) for n in range(200)]


def test_another_process_with_more_threads_and_another_hash_seed_draws_the_same():
    code = "import test_sample_generator as t; print(*map(t.checksum, range(5)))"
    environment = {"OMP_NUM_THREADS": "4", "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, env=environment)
    assert found.stdout.decode().split() == [checksum(n) for n in range(5)], found.stderr.decode()
