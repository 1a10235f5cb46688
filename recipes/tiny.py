"""Every stage at toy size: `make demo` runs these on two CPU cores, in this order."""

from dataclasses import replace

from nemo_moviegen.recipe import (
    AutoencoderSize,
    Bucket,
    ClipData,
    LatentData,
    Layout,
    Optim,
    TaeRecipe,
    Validation,
    VideoRecipe,
)
from nemo_moviegen.sizes import VIDEO_TINY

MOVING_SHAPES = Bucket(num_frames=16, height_px=64, width_px=64, fps=16)


def tae() -> TaeRecipe:
    """Temporal autoencoder (s3.1.1) at small width: 64 px, 16 frames -> 2x8x8 latents of 16 channels.

    Held-out clips after 90 CPU seconds: 17 dB, grey shapes, where steps were too large for the batch (4 clips
    at a rate of 3e-3 and more, whatever the norm) or fresh weights did not carry colour; 21 dB as below. L1
    comes last: from the start its optimum is the background, which covers most of a clip.
    """
    return TaeRecipe(
        name="tiny.tae",
        cluster="cpu_2",
        autoencoder=AutoencoderSize(base_width=8, multipliers=(1, 2, 4, 8), blocks_per_level=1),
        data=ClipData(manifest="out/demo/clips/manifest.parquet", bucket=MOVING_SHAPES),
        optim=Optim(learning_rate=1.5e-3, warmup_steps=20, decay="cosine", weight_decay=0.0, beta2=0.99),
        global_batch=4,
        micro_batch=2,
        image_steps=100,
        image_batch=16,
        num_steps=600,
        squared_error_steps=430,
        kl_weight=1e-4,
        outlier_weight=1.0,  # from fresh weights on, enough to hold the penalty at zero
        precision="fp32",
        output="out/demo/tae",
        save_every=100,
    )


def t2i() -> VideoRecipe:
    """Text-to-image on one-frame latents: the first row of Table 3 (s3.2) at toy size."""
    return VideoRecipe(
        name="tiny.t2i",
        cluster="cpu_2",
        layout=Layout(),
        size=VIDEO_TINY,
        data=LatentData(folder="out/demo/latents", image_every=1),
        latent_frames=1,
        latent_height=8,
        latent_width=8,
        optim=Optim(learning_rate=1e-3, warmup_steps=50, weight_decay=0.0, beta2=0.99),
        global_batch=32,
        micro_batch=16,
        num_steps=400,
        precision="fp32",
        output="out/demo/t2i",
        save_every=200,
        ema_decay=0.99,
        guidance_scale=3.0,
    )


def t2iv() -> VideoRecipe:
    """Joint text-to-image/video, one image iteration in eleven (s3.2), from the image model's weights."""
    base = t2i()
    return replace(
        base,
        name="tiny.t2iv",
        data=replace(base.data, image_every=11),
        latent_frames=2,
        optim=replace(base.optim, decay="cosine"),
        num_steps=1200,
        output="out/demo/t2iv",
        save_every=600,
        init_from="out/demo/t2i",
        validation=Validation(every=200, num_samples=12),
    )
