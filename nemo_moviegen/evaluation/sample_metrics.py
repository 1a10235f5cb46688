"""FID, FVD and CLIP score of generated samples, behind one interface (Movie Gen s3.5.2 says what they miss).

    samples ---(frames, prompt)---> metric.add_sample -+-> metric.result()
    real clips ----(frames)-------> metric.add_real ---+

Each is fed a video at a time and keeps moments or sums, never frames. A number depends on the network as much
as on the videos, and Frechet distances on how many there are: all of that stands beside it.
"""

import json
from pathlib import Path
from typing import Protocol

import torch

from nemo_moviegen.evaluation.features import find_features, to_bytes
from nemo_moviegen.evaluation.frechet import Moments, frechet_distance
from nemo_moviegen.writable import write_whole

RESULT = "metrics.json"


class Metric(Protocol):
    """One number about a set of samples; frames are [T, 3, H, W] in [-1, 1]."""

    name: str
    needs_real: bool

    def add_sample(self, frames_TCHW, prompt): ...

    def add_real(self, frames_TCHW): ...

    def result(self) -> dict:
        """{"value": ..., "network": ..., and what the number rests on}."""


class FrechetMetric:
    """FID of frames (Heusel et al. 2017), or FVD of whole clips (Unterthiner et al. 2018)."""

    needs_real = True

    def __init__(self, features, *, of_clips):
        self.name, self.features, self.of_clips = "fvd" if of_clips else "fid", features, of_clips
        self.moments = {"samples": None, "real": None}

    def add_sample(self, frames_TCHW, prompt):
        self._add("samples", frames_TCHW)

    def add_real(self, frames_TCHW):
        self._add("real", frames_TCHW)

    def _add(self, side, frames_TCHW):
        videos = frames_TCHW.transpose(0, 1)[None] if self.of_clips else frames_TCHW
        moments, known = Moments.of(self.features(videos)), self.moments[side]
        self.moments[side] = moments if known is None else known + moments

    def result(self) -> dict:
        """ValueError for fewer than two vectors on a side."""
        real, fake = self.moments["real"], self.moments["samples"]
        if real is None or fake is None:
            raise ValueError(f"{self.name} compares samples with real clips: one of them is missing")
        return {
            "value": frechet_distance(real, fake),
            "network": self.features.name,
            "is_comparable": self.features.is_comparable,
            "of": {"samples": fake.count, "real": real.count},
        }


class ClipScore:
    """100 times the cosine between prompt and frame (Hessel et al. 2021): the mean over a video's frames, or
    0 if that is less, then over videos. `folder` holds a CLIP model and its processor as transformers saves
    them."""

    name, needs_real = "clip", False

    def __init__(self, folder):
        from transformers import CLIPModel, CLIPProcessor

        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"CLIP folder {folder} does not exist: give one that transformers has saved")
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.pair = model, CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"CLIP folder {folder} holds no CLIP model with its processor ({reason})"
            ) from None
        self.longest = model.config.text_config.max_position_embeddings
        self.scores, self.num_cut = [], 0

    @torch.no_grad()
    def add_sample(self, frames_TCHW, prompt):
        from torchmetrics.functional.multimodal import clip_score

        self.num_cut += len(self.pair[1].tokenizer(prompt)["input_ids"]) > self.longest
        frames = list(to_bytes(frames_TCHW))
        self.scores.append(float(clip_score(frames, [prompt] * len(frames), lambda: self.pair)))

    def add_real(self, frames_TCHW):
        """Nothing: the score is of prompts and samples."""

    def result(self) -> dict:
        if not self.scores:
            raise ValueError("the CLIP score has seen no sample")
        mean = sum(self.scores) / len(self.scores)
        of = {"samples": len(self.scores), "prompts cut": self.num_cut}
        return {"value": mean, "network": self.folder.name, "is_comparable": True, "of": of}


def find_metrics(fid="", fvd="", clip="", device="cpu") -> list[Metric]:
    """The metrics asked for: networks as `features.find_features` takes them, and a CLIP folder.

    ValueError where none is asked for, or a network or folder does not serve.
    """
    metrics = [FrechetMetric(find_features(fid, device), of_clips=False)] if fid else []
    metrics += [FrechetMetric(find_features(fvd, device, clips=True), of_clips=True)] if fvd else []
    metrics += [ClipScore(clip)] if clip else []
    if not metrics:
        raise ValueError("no metric is asked for: give --fid, --fvd or --clip")
    return metrics


def measure_samples(folder, metrics, output, real=None) -> dict:
    """Metrics of a folder that `generate` filled; returns what metrics.json in `output` holds.

    {"samples": folder, "real": what it is compared with, "metrics": {name: result}}. `real` is a manifest
    (its held-out clips, if any), a video or a folder of videos, brought to the shape and rate of the samples.
    ValueError where samples or real clips are missing or a metric can not take them.
    """
    from nemo_moviegen.generation.files import read_bucket, read_samples

    samples, bucket = read_samples(folder), read_bucket(folder)
    if any(metric.needs_real for metric in metrics) and real is None:
        names = ", ".join(metric.name for metric in metrics if metric.needs_real)
        raise ValueError(f"{names} compares with real clips: give --real, a manifest or a folder of videos")
    for prompt, frames_TCHW in _of_samples(samples.values(), bucket):
        for metric in metrics:
            metric.add_sample(frames_TCHW, prompt)
    told = "" if real is None else _add_real(metrics, real, bucket, output)
    found = {"samples": str(folder), "real": told, "metrics": {m.name: m.result() for m in metrics}}
    Path(output).mkdir(parents=True, exist_ok=True)
    write_whole(Path(output, RESULT), json.dumps(found, indent=1) + "\n")
    return found


def _of_samples(samples, bucket):
    """(prompt, frames [T, 3, H, W]) of each: videos as real ones are read, for no two readers round alike."""
    from nemo_moviegen.data.dali import ClipLoader
    from nemo_moviegen.evaluation.spans import whole_file
    from nemo_moviegen.video_files import read_frames

    prompts, files = zip(*samples, strict=True)
    if bucket.num_frames == 1:
        for prompt, file in samples:
            yield prompt, torch.from_numpy(read_frames(file)).permute(0, 3, 1, 2) / 127.5 - 1
        return
    clips = [whole_file(file, file.name) for file in files]
    loader = ClipLoader(clips, bucket, batch_size=1, order=range(len(clips)))
    yield from ((prompts[rows[0]], video_BTCHW[0]) for video_BTCHW, rows in loader)
    if loader.bad_rows:
        raise ValueError(f"{files[min(loader.bad_rows)]} can not be read: remove it and generate it again")


def _add_real(metrics, real, bucket, output):
    """Feed the metrics real clips of the bucket's shape; returns which they are, in words."""
    from nemo_moviegen.data.dali import ClipLoader
    from nemo_moviegen.evaluation.spans import read_source

    source = read_source(real, Path(output))
    kind = "image" if bucket.num_frames == 1 else "video"
    clips = source.clips.select(source.clips.column("kind") == kind)
    if not len(clips):
        raise ValueError(f"{real} holds no {kind} to compare with: give clips of what the samples show")
    loader = ClipLoader(clips, bucket, batch_size=1, order=range(len(clips)))
    for video_BTCHW, _ in loader:
        for metric in metrics:
            metric.add_real(video_BTCHW[0])
    unusable = f", {loader.quarantined} unusable" if loader.quarantined else ""
    return f"{real}: {source.told}{unusable}"


def metrics_table(found):
    """A rich table: a row a metric."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for head in ("metric", "value", "network", "of"):
        table.add_column(head, justify="right" if head == "value" else "left")
    for name, result in found["metrics"].items():
        network = result["network"] + ("" if result["is_comparable"] else " (not comparable with others')")
        of = ", ".join(f"{number:,} {what}" for what, number in result["of"].items())
        table.add_row(name, f"{result['value']:.4g}", network, of)
    return table
