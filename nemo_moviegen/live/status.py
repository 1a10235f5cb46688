"""Where a run stands, from the files of its folder: how far, how fast, who is behind, what went wrong."""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from nemo_moviegen.live.metrics_file import series
from nemo_moviegen.recipe import RECIPE_FILE
from nemo_moviegen.utilisation import counting_error

SKIPPED_FILE = "skipped.jsonl"
SILENT_SECONDS = 300
"""A run or a rank is silent after this, or after twenty of its steps if those take longer: checkpoints,
validation and samples take their time between two steps."""
_SILENT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Status:
    """What page and screen tell; times in seconds, NaN-free: what is not known is None."""

    recipe: dict
    """As recipe.yaml has it."""
    state: str
    """running, finished, ended (before its last step), silent, or waiting (no step yet)."""
    step: int
    num_steps: int
    silent_for: float
    """Since the run last wrote a step."""
    patience: float
    """What a rank may take before it counts as silent."""
    step_seconds: float | None = None
    """Median of the recent steps; likewise the following."""
    eta: float | None = None
    """Until the last step at the recent pace, validation and samples included, checkpoints not."""
    facts: dict[str, float] = field(default_factory=dict)
    """Recent values by the key of metrics.jsonl."""
    problems: tuple[str, ...] = ()
    beats: tuple = ()
    """`heartbeat.Beat` of every rank, by rank."""
    behind: tuple = ()
    """Of them, those that are behind, the furthest first."""
    skipped: tuple = ()
    """Lines of skipped.jsonl."""

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.recipe.get("name", "run")


def read_status(run_folder, metrics, *, now=None, ended=False) -> Status:
    """The `Status` of a run folder at `now` (Unix time), its `MetricsFile` having been read.

    `ended` says that the run is over: whoever calls is the run. ValueError where the folder holds no run.
    """
    now = time.time() if now is None else now
    run_folder = Path(run_folder)
    recipe = _recipe(run_folder)
    recent = metrics.recent
    step, num_steps = recent[-1]["step"] if recent else 0, int(recipe.get("num_steps", 0))
    seconds = _median(series(recent, "speed/step_seconds")[1])
    patience = max(SILENT_SECONDS, _SILENT_STEPS * (seconds or 0))
    written = metrics.path if recent else run_folder / RECIPE_FILE
    silent_for = max(0.0, now - written.stat().st_mtime)
    state = _state(step, num_steps, ended, silent_for > patience)
    beats = sorted(read_beats(run_folder), key=lambda beat: beat.rank)
    is_over = state in ("finished", "ended")
    skipped = _json_lines(run_folder / SKIPPED_FILE)
    facts = recent_facts(recent)
    late = () if is_over else tuple(behind(beats, now, patience))
    return Status(
        recipe=recipe,
        state=state,
        step=step,
        num_steps=num_steps,
        silent_for=silent_for,
        patience=patience,
        step_seconds=seconds,
        eta=None if is_over else eta(recent, num_steps - step),
        facts=facts,
        problems=tuple(_problems(facts, skipped, late, beats, state, silent_for)),
        beats=tuple(beats),
        behind=late,
        skipped=tuple(skipped),
    )


def read_beats(run_folder) -> list:
    """Heartbeats of the run's ranks; [] where none are written."""
    from nemo_moviegen.heartbeat import read_heartbeats

    return read_heartbeats(run_folder)


def behind(beats, now, patience) -> list:
    """Those more than a step behind the first, or silent for longer than `patience`: the furthest first.

    Ranks wait for each other in every step, so that who hangs is a step behind those who wait.
    """
    if not beats:
        return []
    front = max(beat.step for beat in beats)
    late = [beat for beat in beats if beat.step < front - 1 or now - beat.unix_seconds > patience]
    return sorted(late, key=lambda beat: (beat.step, beat.unix_seconds, beat.rank))


def recent_facts(recent) -> dict[str, float]:
    """What the last rows say: means of losses, clips and images apart, medians of speeds, last values."""
    facts = {}
    for name, is_image in (("clips", 0), ("images", 1)):
        losses = series(recent, "train/loss", lambda row, i=is_image: row.get("train/is_image", 0) == i)[1]
        if losses:
            facts[f"train/loss of {name}"] = statistics.fmean(losses)
    for row in recent:
        for key in ("train/learning_rate", "train/skipped", "memory/peak_gib", "memory/resident_gib"):
            if key in row:
                facts[key] = row[key]
    for key in ("tokens_per_second", "frames_per_second", "tflops_per_gpu", "mfu", "hfu"):
        value = _median(series(recent, f"speed/{key}")[1])
        if value is not None:
            facts[f"speed/{key}"] = value
    data, steps = (sum(series(recent, f"speed/{key}")[1]) for key in ("data_seconds", "step_seconds"))
    if steps:
        facts["speed/data_wait"] = data / steps
    return facts


def eta(recent, steps_left) -> float | None:
    """Seconds of so many steps at the recent pace, with what validation and samples took between them."""
    steps, seconds = series(recent, "speed/step_seconds")
    if not seconds:
        return None
    asides = sum(sum(series(recent, key)[1]) for key in ("validation/seconds", "samples/seconds"))
    return max(0, steps_left) * (_median(seconds) + asides / len(steps))


def _state(step, num_steps, ended, is_silent):
    if step and step >= num_steps:
        return "finished"
    if ended:
        return "ended"
    if is_silent:
        return "silent"
    return "running" if step else "waiting"


def _problems(facts, skipped, late, beats, state, silent_for):
    """Sentences for what an operator should look at."""
    if state == "silent":
        yield f"no step for {duration(silent_for)}: the run has ended without saying so, or hangs"
    for key in ("hfu", "mfu"):
        if error := counting_error(facts.get(f"speed/{key}", 0)):
            yield f"{key.upper()}: {error}"
            break
    if late:
        named = ", ".join(f"rank {b.rank} ({b.host}, step {b.step}, {b.phase})" for b in late[:4])
        more = f" and {len(late) - 4} more" if len(late) > 4 else ""
        yield f"{len(late)} of {len(beats)} ranks are behind: {named}{more}"
    if rollbacks := [row for row in skipped if "rolled_back_to" in row]:
        yield f"rollbacks {len(rollbacks)}, the last at step {rollbacks[-1]['step']}: see {SKIPPED_FILE}"
    wait = facts.get("speed/data_wait", 0)
    if wait > 0.05:
        yield f"{wait:.0%} of the step time is waiting for data: see `moviegen bench loader`"


def _recipe(run_folder):
    import yaml

    path = run_folder / RECIPE_FILE
    if not path.is_file():
        raise ValueError(
            f"{run_folder} is no run folder: it holds no {RECIPE_FILE}; give the output of a run"
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it holds {type(recipe).__name__}, it needs keys and values")
    return recipe


def _json_lines(path):
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that is being written
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _median(values):
    return statistics.median(values) if values else None


def duration(seconds) -> str:
    """As people say it: 42 s, 5 min, 3 h 20 min, 12 d 4 h."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
