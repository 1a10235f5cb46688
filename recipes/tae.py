"""The temporal autoencoder (Movie Gen s3.1.1): an image autoencoder, inflated, trained, then freed of dots.

    tae.image_init -> tae.joint -> tae.opl_finetune      production: 256 px, 32 frames
    tae.tiny_image -> tae.tiny                           the demo: Moving Shapes, 64 px, 16 frames
    tae.small -> tae.small_opl                           a real film, overfitted: 256 px, crops of 16 frames

The paper gives sizes of nothing but the latent, the 1:3 batches, the outlier penalty and the steps of its
ablation (50k, then 10k with the penalty). All else here is our default (LDM's).
"""

from dataclasses import replace

from nemo_moviegen.data.clips import BIG_BUCK_BUNNY
from nemo_moviegen.recipe import (
    AutoencoderLosses,
    AutoencoderSize,
    Bucket,
    ClipData,
    Layout,
    Optim,
    TaeRecipe,
)

MOVING_SHAPES = Bucket(num_frames=16, height_px=64, width_px=64, fps=16)
_TINY = AutoencoderSize(base_width=8, multipliers=(1, 2, 4, 8), blocks_per_level=1)
_MUON = Optim(kind="muon", learning_rate=4e-3, warmup_steps=20, decay="cosine", weight_decay=0.0, beta2=0.99)
_VGG = "weights/vgg16-397923af.pth"


def image_init() -> TaeRecipe:
    """Image autoencoder (s3.1.1) the temporal one starts from: LDM's, 16 channels, 256 px, 64 images a step.

    With `init_from` set to a folder of diffusers' AutoencoderKL it goes on from those weights.
    """
    return TaeRecipe(
        name="tae.image_init",
        cluster="h200_8",
        autoencoder=AutoencoderSize(inflation="2D", temporal_compression=1),
        data=ClipData(
            manifest="data/clips/manifest.parquet",
            bucket=Bucket(num_frames=32, height_px=256, width_px=256, fps=16),
            image_every=1,
        ),
        loss=AutoencoderLosses(
            perceptual=1.0,
            vgg_weights=_VGG,
            adversarial=0.1,
            adversarial_from_step=20_000,
            outlier=0.0,
        ),
        optim=Optim(learning_rate=1e-4, warmup_steps=1000, weight_decay=0.0, beta2=0.99),
        global_batch=64,
        micro_batch=8,
        num_steps=200_000,
        ema_decay=0.999,
        output="out/tae/image_init",
        save_every=1000,
    )


def joint() -> TaeRecipe:
    """Temporal autoencoder (s3.1.1): inflated to 2.5D, images and clips of 32 frames 1:3, no penalty yet."""
    image = image_init()
    return replace(
        image,
        name="tae.joint",
        autoencoder=AutoencoderSize(),
        data=replace(image.data, image_every=4),
        loss=replace(image.loss, adversarial_from_step=5000),
        layout=Layout(recompute="full"),
        global_batch=16,
        micro_batch=1,
        image_batch=64,
        num_steps=50_000,
        init_from=image.output,
        output="out/tae/joint",
    )


def opl_finetune() -> TaeRecipe:
    """Outlier penalty (s3.1.1, eq. 1; r = 3, weight 1e5): 10k more steps, which remove latent dots."""
    before = joint()
    return replace(
        before,
        name="tae.opl_finetune",
        loss=replace(before.loss, outlier=1e5, adversarial_from_step=0),
        optim=replace(before.optim, learning_rate=5e-5),
        num_steps=10_000,
        init_from=before.output,
        output="out/tae/opl_finetune",
    )


def tiny_image() -> TaeRecipe:
    """Image autoencoder (s3.1.1) at toy size, on Moving Shapes: what `tae.tiny` is inflated from."""
    return TaeRecipe(
        name="tae.tiny_image",
        cluster="cpu_2",
        autoencoder=replace(_TINY, inflation="2D", temporal_compression=1),
        data=ClipData(
            manifest="out/demo/clips/manifest.parquet",
            bucket=MOVING_SHAPES,
            image_every=1,
            crop_px=32,
        ),
        loss=AutoencoderLosses(squared_error_steps=1_000_000, kl=1e-5, outlier=1.0),
        optim=_MUON,
        global_batch=32,
        micro_batch=16,
        num_steps=120,
        precision="fp32",
        output="out/demo/tae_image",
        save_every=60,
    )


def tiny() -> TaeRecipe:
    """Temporal autoencoder (s3.1.1) at toy size: 64 px, 16 frames -> 2x8x8 latents of 16 channels."""
    image = tiny_image()
    return replace(
        image,
        name="tae.tiny",
        autoencoder=_TINY,
        data=replace(image.data, image_every=4),
        global_batch=8,
        micro_batch=4,
        image_batch=16,
        num_steps=500,
        save_every=100,
        init_from=image.output,
        output="out/demo/tae",
    )


def small() -> TaeRecipe:
    """Temporal autoencoder (s3.1.1) overfitted to five seconds of Big Buck Bunny at 256 px, no penalty.

    Clips are as long as the tiles it is used in. Trained on 16 frames it rebuilt the film with 28.0 dB in
    tiles of 16 frames, 25.1 in tiles of 32 and 24.1 in one stream; crops of 64 px cost nothing.
    """
    return TaeRecipe(
        name="tae.small",
        cluster="cpu_2",
        autoencoder=_TINY,
        data=ClipData(
            manifest=str(BIG_BUCK_BUNNY),
            bucket=Bucket(num_frames=32, height_px=256, width_px=256, fps=25),
            crop_px=64,
            in_memory=True,
        ),
        loss=AutoencoderLosses(squared_error_steps=1_000_000, outlier=0.0),
        optim=_MUON,
        global_batch=2,
        micro_batch=1,
        image_batch=8,
        num_steps=2500,
        precision="fp32",
        output="out/tae/small",
        save_every=250,
    )


def small_opl() -> TaeRecipe:
    """Outlier penalty (s3.1.1, eq. 1) as the paper adds it, at small size: more steps of `tae.small` with it.

    `loss.outlier=0` gives the run to compare with. Latents of `tae.small` end 2.95 deviations from the mean:
    r is 2 here, at 3 there is nothing to do. A weight of 1 took half a decibel, one of 0.05 nothing.
    """
    before = small()
    return replace(
        before,
        name="tae.small_opl",
        loss=replace(before.loss, outlier=0.05, outlier_scale=2.0),
        optim=replace(before.optim, learning_rate=1e-3),
        num_steps=150,
        init_from=before.output,
        output="out/tae/small_opl",
    )
