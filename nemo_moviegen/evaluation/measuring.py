"""What one run makes of one clip, and what is kept of that: numbers, moments of features, a few pictures."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_moviegen.evaluation.frechet import Moments
from nemo_moviegen.evaluation.metrics import outlier_norms, outlier_summary, psnr, ssim
from nemo_moviegen.evaluation.pictures import NUM_SHOWN, Dots, Shown, shown_frames
from nemo_moviegen.tae.tiling import decode_tiled, encode_tiled
from nemo_moviegen.training.autoencoder_weights import load_autoencoder

PIXELS_PER_LATENT = 8
"""Rows, and columns: of every autoencoder here."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One autoencoder to measure."""

    label: str
    """The end of its folder's path that tells it from the others."""
    folder: str
    autoencoder: torch.nn.Module

    @property
    def frames_per_latent(self) -> int:
        return self.autoencoder.size.temporal_compression

    @property
    def compression(self) -> str:
        """Frames x rows x columns in one latent, and its channels."""
        side, channels = PIXELS_PER_LATENT, self.autoencoder.size.latent_channels
        return f"{self.frames_per_latent}x{side}x{side}, {channels} ch"


@dataclass
class Found:
    """What one rank measured: grows by numbers a clip, by pictures up to `NUM_SHOWN`."""

    clips: list[dict] = field(default_factory=list)
    moments: dict[tuple, Moments] = field(default_factory=dict)
    """Of features, by (group, run's label), and (group, "") of the originals."""
    shown: list[Shown] = field(default_factory=list)
    dots: list[Dots] = field(default_factory=list)

    def add_moments(self, key, moments):
        """Those of further frames."""
        self.moments[key] = self.moments[key] + moments if key in self.moments else moments

    def add_dots(self, dots):
        """Keep it if its latents stick out further than those of others."""
        self.dots = sorted([*self.dots, dots], key=lambda d: (-d.largest_norm, d.job))[:NUM_SHOWN]


def together(parts) -> Found:
    """What several ranks found, in the order one rank would have."""
    whole = Found()
    for part in parts:
        whole.clips += part.clips
        whole.shown += part.shown
        for key, moments in part.moments.items():
            whole.add_moments(key, moments)
        for dots in part.dots:
            whole.add_dots(dots)
    whole.clips.sort(key=lambda clip: clip["job"])
    whole.shown.sort(key=lambda shown: shown.job)
    return whole


def load_runs(folders, device) -> list[Run]:
    """The autoencoders of these run folders; ValueError for a folder given twice, or without one."""
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: compare a run with other runs")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [
        Run(
            label="/".join(path.parts[-depth:]),
            folder=str(folder),
            autoencoder=load_autoencoder(folder).to(device),
        )
        for path, folder in zip(paths, folders, strict=True)
    ]


@torch.inference_mode()
def measure(found, job, group, clip, video_TCHW, runs, features, tiling, shares=None):
    """Add to `found` what every run makes of the frames of one clip, all at the same ones.

    `shares` is a process group whose ranks all call this and share the clip's tiles.

    ValueError names the run and the clip where the reconstruction is not finite.
    """
    num_frames, num_panels = len(video_TCHW), 1 + len(runs)
    panels, latents = [shown_frames(video_TCHW, num_panels)], []
    found.add_moments((group, ""), Moments.of(features(video_TCHW)))
    for run in runs:
        started = _now(video_TCHW.device)
        latent_BTCHW = encode_tiled(run.autoencoder, video_TCHW[None], tiling, shares)
        rebuilt_BTCHW = decode_tiled(run.autoencoder, latent_BTCHW, num_frames, tiling, shares)
        coding_seconds = _now(video_TCHW.device) - started
        if not (latent_BTCHW.isfinite().all() and rebuilt_BTCHW.isfinite().all()):
            raise ValueError(
                f"{run.folder}: clip {clip.clip_id} comes out as NaN or infinity: the run has diverged; "
                "name another"
            )
        rebuilt_TCHW = rebuilt_BTCHW[0].float()  # what looks at it clamps it
        found.add_moments((group, run.label), Moments.of(features(rebuilt_TCHW)))
        found.clips.append(
            {
                "job": job,
                "group": group,
                "run": run.label,
                "clip_id": clip.clip_id,
                "path": clip.path,
                "start_seconds": clip.start_seconds,
                "num_frames": num_frames,
                "ssim": float(ssim(rebuilt_TCHW, video_TCHW).mean()),
                "psnr_db": float(psnr(rebuilt_TCHW, video_TCHW).mean()),
                **outlier_summary(latent_BTCHW),
                "coding_seconds": coding_seconds,
            }
        )
        panels.append(shown_frames(rebuilt_TCHW, num_panels))
        latents.append((run, outlier_norms(latent_BTCHW)[0].float().cpu(), rebuilt_TCHW))
    if job < NUM_SHOWN:
        found.shown.append(Shown(job=job, title=f"{group}  {clip.clip_id}", panels=panels))
    found.add_dots(_worst_frame(job, clip, video_TCHW, latents))


def _worst_frame(job, clip, video_TCHW, latents):
    """The frame whose latents stick out furthest, whichever run's they are, as every run has it."""
    run, norm_THW, _ = max(latents, key=lambda one: float(one[1].max()))
    latent = int(norm_THW.amax(dim=(1, 2)).argmax())
    frame = min(latent * run.frames_per_latent + run.frames_per_latent // 2, len(video_TCHW) - 1)
    return Dots(
        job=job,
        title=f"{clip.clip_id}, frame {frame + 1}",
        largest_norm=float(norm_THW.max()),
        original=_one_frame(video_TCHW, frame),
        rebuilt=[_one_frame(rebuilt_TCHW, frame) for _, _, rebuilt_TCHW in latents],
        norms=[norm_THW[frame // run.frames_per_latent].numpy() for run, norm_THW, _ in latents],
    )


def _one_frame(video_TCHW, frame):
    return shown_frames(video_TCHW[frame : frame + 1], num_panels=2)[0]


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
