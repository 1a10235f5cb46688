"""The 5B ablations (s3.6.2): what the paper compares objectives, captions and backbones with.

32 layers, width 3072, 24 heads, 352x192 px, clips of 4 to 8 s, 21M landscape videos. The paper states the
batches, rates, iterations and the 512 GPUs of the first stage; layout and the rest of the optimiser are our
default.
"""

from dataclasses import replace

from nemo_moviegen.recipe import LatentData, Layout, Optim, VideoRecipe
from nemo_moviegen.sizes import VIDEO_5B


def t2i() -> VideoRecipe:
    """Stage 1 (s3.6.2): images of 352x192, rate 3e-4, batch 9,216 over 512 GPUs: 18 each. 96k iterations.

    264 tokens an image. The position tables are as long as the picture: 12 x 22 patches (our default).
    """
    return VideoRecipe(
        name="ablation_5b.t2i",
        cluster="h100_512",
        layout=Layout(sharding="full"),
        size=replace(VIDEO_5B, max_frames=1, max_height=12, max_width=22),
        data=LatentData(folder="data/latents_ablation", buckets="ablation_192", image_every=1),
        latent_frames=1,
        latent_height=24,
        latent_width=44,
        optim=Optim(learning_rate=3e-4),
        global_batch=9216,
        micro_batch=18,
        num_steps=96_000,
        output="runs/ablation_5b/t2i",
    )


def t2iv() -> VideoRecipe:
    """Stage 2 (s3.6.2): iterations of 256 clips or 4,096 images, 1 : 0.02 of them; rate 5e-5, 100k in all.

    0.02 : 1 is one image iteration after every 50 of video: one in 51. Clips are latents of 16x24x44, 4,224
    tokens; 16 images have as many, so all iterations are of one size.
    NOT STATED: the GPUs; ours are the 512 of stage 1, TP 2 -> 256 copies, 1 clip or 16 images each.
    """
    before = t2i()
    return replace(
        before,
        name="ablation_5b.t2iv",
        layout=replace(before.layout, tensor=2, recompute="selective"),
        size=replace(before.size, max_frames=16),
        data=replace(before.data, image_every=51),
        latent_frames=16,
        optim=replace(before.optim, learning_rate=5e-5),
        global_batch=256,
        image_batch=4096,
        micro_batch=1,
        num_steps=100_000,
        output="runs/ablation_5b/t2iv",
        init_from=before.output,
    )
