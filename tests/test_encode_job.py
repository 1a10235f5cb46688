"""`moviegen encode` as a job array: killed anywhere, resumed with any number of tasks, the same bytes.

Seen to fail with: tasks that overlap (>= for ==) or leave shards out, an index over the shards that happen to
be there, a table that is believed without its shard, sums kept from one shard to the next.
"""

import json
import multiprocessing
import os
import random
import resource
import signal

import pytest
from encoding import Killed, a_clip, a_plan, files, indexed, lines, run, some_clips, stand_in, usable

from nemo_moviegen.__main__ import _is_users_mistake
from nemo_moviegen.data.encoded import told
from nemo_moviegen.data.latents import LatentReader

pytestmark = pytest.mark.usefixtures(stand_in.__name__)


@pytest.mark.parametrize("seed", range(25))
def test_a_job_killed_at_random_and_resumed_with_other_tasks_writes_the_same_bytes(tmp_path, seed):
    rng = random.Random(seed)
    clips = [a_clip("t"), a_clip("h", split="heldout"), *some_clips(rng, rng.randint(5, 40))]
    plan = a_plan(tmp_path / "in", clips, samples_per_shard=rng.randint(1, 6))
    run(plan, tmp_path / "whole")
    output = tmp_path / "killed"
    for _ in range(rng.randint(1, 6)):
        num_tasks = rng.randint(1, 4)
        try:
            run(plan, output, (rng.randrange(num_tasks), num_tasks), calls=rng.randint(0, 8))
        except Killed:
            with pytest.raises(ValueError, match="no finished latents"):
                LatentReader(output)
    num_tasks = rng.randint(1, 5)
    for task in rng.sample(range(num_tasks), num_tasks):
        _, summary = run(plan, output, (task, num_tasks))
    assert summary["missing"] == 0
    assert files(output) == files(tmp_path / "whole")
    assert sorted(indexed(output)) == sorted(usable(clips))
    told_of = [json.loads(line)["clip_id"] for line in lines(output / "quarantine.jsonl")]
    told_of += [json.loads(line)["clip_id"] for line in lines(tmp_path / "killed_heldout/quarantine.jsonl")]
    assert sorted(told_of) == sorted({clip.clip_id for clip in clips} - usable(clips))
    number, again = run(plan, output)
    assert number == 0 and again == summary


def test_without_all_shards_there_is_no_index_and_the_run_says_how_many_are_missing(tmp_path):
    plan = a_plan(tmp_path / "in", [a_clip(n) for n in range(12)])
    assert len(plan.shards) == 4
    _, summary = run(plan, tmp_path / "out", (1, 4))
    assert summary["missing"] == 3 and summary["train"] == 3
    assert "not finished: 3 shards of other tasks are missing" in told(
        "out", summary | {"encoded": 3, "seconds": 1}
    )
    with pytest.raises(ValueError, match=r"no finished latents in .*run `moviegen encode` to its end"):
        LatentReader(tmp_path / "out")


@pytest.mark.parametrize("harm", ["no table", "no shard", "truncated", "damaged table"])
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(tmp_path, harm):
    plan = a_plan(tmp_path / "in", [a_clip(n) for n in range(12)])
    output = tmp_path / "out"
    run(plan, output)
    before = files(output)
    shard = output / f"{plan.shards[2].name}.tar"
    table = shard.with_suffix(".parquet")
    if harm == "no table":
        table.unlink()
    elif harm == "no shard":
        shard.unlink()
    elif harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        table.write_bytes(table.read_bytes()[:-20])
    if harm in ("no shard", "truncated"):
        with pytest.raises(
            ValueError, match=rf"{shard.name}: sample clip8 cannot be read: .*moviegen encode"
        ):
            LatentReader(output)
    number, summary = run(plan, output)
    assert number == 3 and summary["missing"] == 0
    assert files(output) == before


def in_child(work):
    """Run `work` in a process of its own; returns its exit code."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("call", range(1, 12, 2))
def test_sigkill_between_any_two_renames_loses_the_shard_under_way_at_most(tmp_path, monkeypatch, call):
    clips = [a_clip(n, split="heldout" if n > 8 else "train") for n in range(12)]
    plan = a_plan(tmp_path / "in", clips)
    run(plan, tmp_path / "whole")
    output, whole = tmp_path / "killed", os.replace
    calls = []

    def dies(source, target):
        calls.append(target)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(source, target)

    def work():
        monkeypatch.setattr(os, "replace", dies)
        run(plan, output)

    assert in_child(work) == -signal.SIGKILL
    number, _ = run(plan, output)
    assert number >= 12 - 3 * (call // 2)
    assert files(output) == files(tmp_path / "whole")


def test_a_full_disk_is_named_and_leaves_no_half_shard(tmp_path):
    """A limit on the size of a file stands for the disk: the images fit, the clips do not."""
    clips = [a_clip(n, 0) for n in range(3)] + [a_clip(n) for n in range(3, 9)]
    plan = a_plan(tmp_path / "in", clips, samples_per_shard=6)
    run(plan, tmp_path / "whole")
    sizes = sorted(len(data) for (_, name), data in files(tmp_path / "whole").items() if name.endswith("tar"))
    output, said = tmp_path / "full", tmp_path / "said"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 2000, resource.RLIM_INFINITY))
        try:
            run(plan, output)
        except ValueError as error:
            said.write_text(str(error) if _is_users_mistake(error) else "a stack trace")

    assert in_child(work) == 0
    large = max(plan.shards, key=lambda shard: len(shard.rows)).name
    assert f"{output / large}.tar cannot be written: File too large; make room" in said.read_text()
    left = {path.name for path in output.iterdir()}
    assert left == {"empty_prompt.npz", *(f"{plan.shards[0].name}.{end}" for end in ("tar", "parquet"))}
    assert run(plan, output)[0] == 6
    assert files(output) == files(tmp_path / "whole")


def test_a_split_without_a_readable_clip_stops_the_other_from_nothing(tmp_path):
    clips = [a_clip(0), a_clip(1), a_clip(2, split="heldout", path="/videos/bad.mp4")]
    _, summary = run(a_plan(tmp_path / "in", clips), tmp_path / "out")
    assert (summary["train"], summary["heldout"], summary["quarantined"]) == (2, 0, ["clip2"])
    assert len(LatentReader(tmp_path / "out")) == 2
    with pytest.raises(ValueError, match="no finished latents"):
        LatentReader(tmp_path / "out_heldout")
    with pytest.raises(ValueError, match="no sample was written; were all clips quarantined"):
        run(a_plan(tmp_path / "in", [a_clip(0, path="/videos/bad.mp4")]), tmp_path / "out")
