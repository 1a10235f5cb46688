"""The transformer's stages at toy size: `make demo` runs these on two CPU cores, in this order."""

from dataclasses import replace

from nemo_moviegen.recipe import (
    LatentData,
    Layout,
    Optim,
    Validation,
    VideoRecipe,
)
from nemo_moviegen.sizes import VIDEO_TINY


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
