"""Pre-training of the 30B video model (s3.2): one function a row of Table 3, later rows derived from earlier.

Global batch = batch a model copy * GPUs / (TP * CP), the table's footnote. Optimiser values but the learning
rates are our default (s3.2 does not state them). An image is a one-frame clip; in the joint stages one
iteration in eleven takes images (1:10). Latents are 8x smaller than the clips in time, height and width. The
position tables grow with the stages (s3.1.3): 16, 32, 96 patches in space; frames from the first clips on.

Weights, gradients and optimiser are shared out over all data-parallel ranks (s3.1.6). The paper recomputes
selectively and does not say what. Here it is the feed-forward: of a clip of 73,728 tokens over TP 4 and CP 2
a rank keeps 60 GB of activations then. Over TP 4 alone it would be 120, so rows 4 and 5 recompute whole
layers, which keeps 11 (what a layer keeps of a token is measured: video/model.py).

Each stage names its buckets, and every shape of them must divide by the layout: square images first, for the
16 patches of the first tables, then Table 2's durations in five aspect ratios. `moviegen encode --buckets`
writes data/latents_image_256, data/latents_256 and data/latents_768 below the cluster's root.

The paper lowered the rate of the 768 px stages where the validation loss stopped falling, and Table 3 is the
result: the rows have its rates, and `t2iv_768_6144_plateau` lets the run find its own.

Each row has an FP8 variant, its name and `_fp8`: the same run from the same weights, so the two compare.
"""

from dataclasses import replace

from nemo_moviegen.recipe import Fp8, LatentData, Layout, Optim, Validation, VideoRecipe
from nemo_moviegen.sizes import VIDEO_30B


def in_fp8(function):
    """The recipe function of the FP8 variant: scales from the present tensors, first and last layer in bf16.

    The paper states no precision: this is our default, as is everything of FP8 (nemo_moviegen/precision.py).
    """

    def variant() -> VideoRecipe:
        base = function()
        return replace(
            base,
            name=f"{base.name}_fp8",
            precision="fp8_current",
            fp8=Fp8(bf16_layers=1),
            output=f"{base.output}_fp8",
        )

    variant.__doc__ = f"FP8: {function.__doc__}"
    return variant


def t2i_256_1536() -> VideoRecipe:
    """Row 1 of Table 3 (s3.2): 256 px text-to-image, from fresh weights.

    TP 1, CP 1, 1,536 H100s -> 1,536 copies, 6 images each: global batch 9,216.
    256 tokens an image, 210k iterations, 1.94B images seen.
    """
    return VideoRecipe(
        name="video_30b.t2i_256_1536",
        cluster="h100_1536",
        layout=Layout(tensor=1, context=1, sharding="full"),
        size=replace(VIDEO_30B, max_frames=1, max_height=16, max_width=16),
        data=LatentData(folder="data/latents_image_256", buckets="image_256", image_every=1),
        latent_frames=1,
        latent_height=32,
        latent_width=32,
        optim=Optim(learning_rate=1e-4),
        global_batch=9216,
        micro_batch=6,
        num_steps=210_000,
        output="runs/video_30b/t2i_256_1536",
    )


def t2iv_256_3072() -> VideoRecipe:
    """Row 2 of Table 3 (s3.2): 256 px text-to-image/video (a), from the image model.

    TP 4, 3,072 H100s -> 768 copies, 2 clips each: global batch 1,536.
    8,192 tokens a clip of 32 latent frames, 113k iterations, 173.6M clips seen:
    the table prints 123k, which fits neither its samples nor its total.
    """
    base = t2i_256_1536()
    return replace(
        base,
        name="video_30b.t2iv_256_3072",
        cluster="h100_3072",
        layout=replace(base.layout, tensor=4, recompute="selective"),
        size=replace(base.size, max_frames=32, max_height=32, max_width=32),
        data=LatentData(folder="data/latents_256", buckets="video_256", image_every=11),
        latent_frames=32,
        optim=replace(base.optim, learning_rate=6e-5),
        global_batch=1536,
        micro_batch=2,
        num_steps=113_000,
        output="runs/video_30b/t2iv_256_3072",
        init_from=base.output,
    )


def t2iv_256_6144() -> VideoRecipe:
    """Row 3 of Table 3 (s3.2): 256 px text-to-image/video (b), twice the GPUs and the batch.

    TP 4, 6,144 H100s -> 1,536 copies, 2 clips each: global batch 3,072. 72k iterations, 221.2M clips seen.
    """
    base = t2iv_256_3072()
    return replace(
        base,
        name="video_30b.t2iv_256_6144",
        cluster="h100_6144",
        global_batch=3072,
        num_steps=72_000,
        output="runs/video_30b/t2iv_256_6144",
        init_from=base.output,
    )


def t2iv_768_6144_a() -> VideoRecipe:
    """Row 4 of Table 3 (s3.2): 768 px text-to-image/video (a).

    TP 4, 6,144 H100s -> 1,536 copies, 1 clip each: global batch 1,536.
    73,728 tokens a clip of 32 latent frames, 19.6k iterations, 30.1M clips seen.
    """
    base = t2iv_256_6144()
    return replace(
        base,
        name="video_30b.t2iv_768_6144_a",
        layout=replace(base.layout, recompute="full"),
        size=replace(base.size, max_height=96, max_width=96),
        data=replace(base.data, folder="data/latents_768", buckets="video_768"),
        latent_height=96,
        latent_width=96,
        global_batch=1536,
        micro_batch=1,
        num_steps=19_600,
        output="runs/video_30b/t2iv_768_6144_a",
        init_from=base.output,
    )


def t2iv_768_6144_b() -> VideoRecipe:
    """Row 5 of Table 3 (s3.2): 768 px text-to-image/video (b), half the learning rate.

    11k iterations, 16.9M clips seen.
    """
    base = t2iv_768_6144_a()
    return replace(
        base,
        name="video_30b.t2iv_768_6144_b",
        optim=replace(base.optim, learning_rate=3e-5),
        num_steps=11_000,
        output="runs/video_30b/t2iv_768_6144_b",
        init_from=base.output,
    )


def t2iv_768_6144_plateau() -> VideoRecipe:
    """Rows 4 and 5 of Table 3 as one run (s3.2) that finds its rates: halved where validation loss stalls.

    30.6k iterations from 6e-5. When a loss counts as stalled is our default (`optim.plateau`).
    """
    base = t2iv_768_6144_a()
    return replace(
        base,
        name="video_30b.t2iv_768_6144_plateau",
        optim=replace(base.optim, decay="plateau"),
        num_steps=base.num_steps + t2iv_768_6144_b().num_steps,
        output="runs/video_30b/t2iv_768_6144_plateau",
        validation=Validation(every=250),
    )


def t2iv_768_cp2_6144() -> VideoRecipe:
    """Row 6 of Table 3 (s3.2): 768 px text-to-image/video (c), clips split over two more ranks.

    TP 4, CP 2, 6,144 H100s -> 768 copies, 1 clip each: global batch 768. 15.9k iterations, 12.2M clips seen.
    """
    base = t2iv_768_6144_b()
    return replace(
        base,
        name="video_30b.t2iv_768_cp2_6144",
        layout=replace(base.layout, context=2, recompute="selective"),
        optim=replace(base.optim, learning_rate=2e-5),
        global_batch=768,
        num_steps=15_900,
        output="runs/video_30b/t2iv_768_cp2_6144",
        init_from=base.output,
    )


def t2iv_768_cp2_4096() -> VideoRecipe:
    """Row 7 of Table 3 (s3.2): 768 px text-to-image/video (d), the last stage.

    TP 4, CP 2, 4,096 H100s -> 512 copies, 1 clip each: global batch 512.
    28k iterations: 14.3M clips, where the table prints 14.6M.
    """
    base = t2iv_768_cp2_6144()
    return replace(
        base,
        name="video_30b.t2iv_768_cp2_4096",
        cluster="h100_4096",
        optim=replace(base.optim, learning_rate=1e-5),
        global_batch=512,
        num_steps=28_000,
        output="runs/video_30b/t2iv_768_cp2_4096",
        init_from=base.output,
    )


TABLE_3 = (
    t2i_256_1536,
    t2iv_256_3072,
    t2iv_256_6144,
    t2iv_768_6144_a,
    t2iv_768_6144_b,
    t2iv_768_cp2_6144,
    t2iv_768_cp2_4096,
)
"""Its rows, in order."""
