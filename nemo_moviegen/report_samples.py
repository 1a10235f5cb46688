"""Real, reconstructed and generated videos of a demo, side by side, as the report shows them."""

import base64
import io
import json
import tempfile
from pathlib import Path

import numpy as np

from nemo_moviegen.video_files import pick_frames, read_frames, to_uint8, write_mp4

NUM_STRIP_FRAMES = 8


def samples_part(demo) -> dict:
    """Generated videos beside the real and the reconstructed clip of the same caption, where there is one."""
    path = demo / "generated" / "settings.json"
    if not path.is_file():
        return {"samples": [], "sampling": ""}
    settings = json.loads(path.read_text())
    prompts = [sample["prompt"] for sample in settings["samples"]]
    clips = captioned_clips(demo, prompts, "image" if settings["num_frames"] == 1 else "video")
    known = {}
    if clips and (demo / "tae").is_dir():
        from nemo_moviegen.recipe import Bucket
        from nemo_moviegen.training.autoencoder_weights import load_autoencoder

        bucket = Bucket(**{name: settings[name] for name in ("num_frames", "height_px", "width_px", "fps")})
        known = real_and_rebuilt(clips, bucket, load_autoencoder(demo / "tae"))
    samples = []
    for sample in settings["samples"]:
        split, real, rebuilt = known.get(sample["prompt"], (None, None, None))
        generated = read_frames(path.parent / sample["file"])
        views = [("real", real), ("reconstructed", rebuilt), ("generated", generated)]
        views = [view(name, frames, settings["fps"]) for name, frames in views]
        notes = {
            "train": "seen in training",
            "heldout": "held out: this combination was never trained on",
            None: "no clip of the data set has this caption",
        }
        samples.append(
            {
                "prompt": sample["prompt"],
                "note": notes[split],
                "views": views,
                "has_strips": any(v["strip"] for v in views),
                "shape": f"{settings['width_px']} / {settings['height_px']}",
            }
        )
    sampling = (
        f"Sampled with {settings['recipe']}: {settings['schedule']}, guidance "
        f"{settings['guidance_scale']:g}, seed {settings['seed']}, "
        f"{settings['sampling_seconds']:.1f} s for {len(prompts)} prompts."
    )
    return {"samples": samples, "sampling": sampling}


def view(name, frames_THWC, fps) -> dict:
    """What the page shows of uint8 frames, or of None: a looping mp4 and a strip of frames, or one image."""
    shown = {"name": name, "video": "", "image": "", "strip": "", "picked": ""}
    if frames_THWC is None:
        return shown
    if len(frames_THWC) == 1:
        return {**shown, "image": _png(frames_THWC[0])}
    picked = pick_frames(len(frames_THWC), NUM_STRIP_FRAMES)
    gap = np.full((frames_THWC.shape[1], 2, 3), 255, np.uint8)
    strip = np.concatenate([part for i in picked for part in (frames_THWC[i], gap)][:-1], axis=1)
    with tempfile.TemporaryDirectory() as folder:
        video_TCHW = frames_THWC.transpose(0, 3, 1, 2) / 127.5 - 1
        mp4 = write_mp4(video_TCHW, Path(folder) / "clip.mp4", fps).read_bytes()
    return {
        **shown,
        "video": data_uri(mp4, "video/mp4"),
        "image": _png(frames_THWC[len(frames_THWC) // 2]),  # where a phone saves data and does not play
        "strip": _png(strip),
        "picked": f"{picked[0] + 1} to {picked[-1] + 1}",
    }


def captioned_clips(demo, prompts, kind) -> list:
    """For each prompt that is the caption of clips of this kind, the first of them."""
    from nemo_moviegen.data.clips import read_manifest

    manifest = demo / "clips" / "manifest.parquet"
    clips = read_manifest(manifest) if manifest.is_file() else []
    first = {}
    for clip in clips:
        if clip.kind == kind and clip.caption in prompts:
            first.setdefault(clip.caption, clip)
    return list(first.values())


def real_and_rebuilt(clips, bucket, autoencoder) -> dict:
    """{caption: (split, real, reconstructed)} with uint8 frames [T, H, W, 3], as the bucket delivers them."""
    import torch

    from nemo_moviegen.data.dali import ClipLoader

    found = {}
    device = next(autoencoder.parameters()).device
    loader = ClipLoader(clips, bucket, batch_size=1, order=range(len(clips)))
    for video_BTCHW, rows in loader:
        with torch.no_grad():
            latent_BTCHW = autoencoder.encode(video_BTCHW.to(device)).mean_BTCHW
            rebuilt_BTCHW = autoencoder.decode(latent_BTCHW, num_frames=video_BTCHW.shape[1]).cpu()
        clip = clips[rows[0]]
        found[clip.caption] = (clip.split, to_uint8(video_BTCHW[0]), to_uint8(rebuilt_BTCHW[0]))
    return found


def data_uri(content: bytes, kind) -> str:
    """`content` as a data: address of MIME type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(frame_HWC):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, format="PNG")
    return data_uri(buffer.getvalue(), "image/png")
