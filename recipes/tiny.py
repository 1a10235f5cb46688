"""The transformer's stages at toy size. `make demo` runs `t2i` and `t2iv` on two CPU cores, in this order.

The others are twins of the full-size recipes, derived from them: the same fields, stages and layouts as far
as two ranks go (TP 4 becomes TP 2), on the latents that the demo wrote.
"""

import re
from dataclasses import replace

from nemo_moviegen.recipe import LatentData, Layout, Optim, Validation, VideoRecipe
from nemo_moviegen.sizes import VIDEO_TINY
from recipes import ablation_5b, post_training, video_30b


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
        optim=Optim(learning_rate=2e-3, warmup_steps=50, weight_decay=0.0, beta2=0.99),
        global_batch=16,
        micro_batch=8,
        num_steps=250,
        precision="fp32",
        output="out/demo/t2i",
        save_every=125,
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


def shapes_long() -> VideoRecipe:
    """Moving Shapes at 16 and 24 frames a second, the rates of finetuning (s3.3), until prompts are right.

    `moviegen demo --recipe tiny.shapes_long` makes the clips, trains what comes before, and counts.
    """
    base = t2iv()
    return replace(
        base,
        name="tiny.shapes_long",
        data=replace(base.data, folder="out/shapes_long/latents", buckets="shapes"),
        num_steps=4500,
        output="out/shapes_long/t2iv",
        save_every=500,
        keep_every=500,
        init_from="out/shapes_long/t2i",
        validation=Validation(every=500, num_samples=48),
    )


def twin_of(function, name):
    """The recipe function `tiny.NAME` of a full-size one at toy size.

    Sizes, batch and steps are toys, rates ten times the full ones; what makes the stage stays: images among
    clips and their batch, how the rate falls, sharding, recomputation, split tensors or tokens, validation.
    """

    def twin() -> VideoRecipe:
        full, toy = function(), t2i()
        layout = full.layout
        context = min(layout.context, 2)
        frames = min(full.size.max_frames, VIDEO_TINY.max_frames)
        table = _ROW_TABLES.get(full.size.max_height, 8)
        return replace(
            full,
            name=f"tiny.{name}",
            cluster=toy.cluster,
            layout=replace(layout, context=context, tensor=min(layout.tensor, 2 // context)),
            size=replace(VIDEO_TINY, max_frames=frames, max_height=table, max_width=table),
            data=replace(full.data, folder=toy.data.folder, buckets=_buckets(full)),
            latent_frames=min(full.latent_frames, 2),
            latent_height=toy.latent_height,
            latent_width=toy.latent_width,
            optim=replace(full.optim, learning_rate=10 * full.optim.learning_rate, warmup_steps=5),
            global_batch=8,
            image_batch=32 if full.image_batch else 0,
            micro_batch=4,
            num_steps=24,
            precision=toy.precision,
            output=_place(full.output),
            init_from=_place(full.init_from),
            save_every=12,
            validation=replace(full.validation, every=6 if full.validation.every else 0, num_samples=12),
        )

    section = re.search(r"\(s3[^)]*\)", function.__doc__)[0]
    twin.__doc__ = f"Twin of {function().name} {section} at toy size."
    return twin


def _buckets(full):
    return "tiny_image" if full.data.buckets == "image_256" else "tiny"


def _place(run_folder):
    return run_folder.replace("runs/", "out/tiny/", 1)


_ROW_TABLES = {16: 4, 32: 8, 96: 16}
"""Length of the tables over rows and columns, as they grow with the stages (s3.1.3): full size and toy."""

TWINS = {
    name: twin_of(function, name)
    for name, function in {
        **{function.__name__: function for function in video_30b.TABLE_3},
        "t2iv_768_6144_plateau": video_30b.t2iv_768_6144_plateau,
        "sft": post_training.sft,
        "t2i_1024": post_training.t2i_1024,
        "t2i_quality": post_training.t2i_quality,
        "ablation_t2i": ablation_5b.t2i,
        "ablation_t2iv": ablation_5b.t2iv,
    }.items()
}
"""By what follows `tiny.` in their names."""
