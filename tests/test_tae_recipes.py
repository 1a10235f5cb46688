"""Recipes of the autoencoder: the paper's stages, and what is refused before anything starts."""

from dataclasses import replace

import pytest

import recipes
from nemo_moviegen.launch import check_inputs
from nemo_moviegen.recipe import AutoencoderLosses, DiscriminatorSettings, Optim, override


def test_the_stages_follow_each_other_and_the_penalty_comes_last():
    """s3.1.1: images and clips 1:3, 50k steps without the penalty, 10k with it, r = 3, weight 1e5."""
    image, joint, finetune = (recipes.get(f"tae.{name}") for name in ("image_init", "joint", "opl_finetune"))
    assert joint.init_from == image.output and finetune.init_from == joint.output
    assert image.autoencoder == replace(joint.autoencoder, inflation="2D", temporal_compression=1)
    assert (joint.autoencoder.temporal_compression, joint.autoencoder.latent_channels) == (8, 16)
    assert image.data.image_every == 1 and joint.data.image_every == finetune.data.image_every == 4
    assert joint.num_steps == 50_000 and finetune.num_steps == 10_000
    assert image.loss.outlier == joint.loss.outlier == 0
    assert (finetune.loss.outlier, finetune.loss.outlier_scale, finetune.loss.outlier_from_step) == (
        1e5,
        3,
        0,
    )
    assert joint.loss.perceptual and joint.loss.adversarial and joint.discriminator.clips
    assert joint.data.bucket.num_frames == 32, "one tile"


@pytest.mark.parametrize("stages", [("tiny_image", "tiny"), ("small", "small_opl")])
def test_small_stages_start_from_each_other(stages):
    first, second = (recipes.get(f"tae.{name}") for name in stages)
    assert second.init_from == first.output
    assert first.autoencoder.base_width == second.autoencoder.base_width
    assert first.data.manifest == second.data.manifest


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["loss.perceptual=1"], "set loss.vgg_weights to a local file"),
        (["loss.kl=-1"], "loss.kl is -1.0; use 0 or more"),
        (["loss.outlier=nan"], "loss.outlier is nan"),
        (["loss.adversarial_from_step=-1"], "loss.adversarial_from_step is -1"),
        (["discriminator.frames=false", "discriminator.clips=false"], "are both off"),
        (["discriminator.width=0"], "discriminator.width is 0"),
        (["discriminator.learning_rate=0"], "discriminator.learning_rate is 0"),
        (["ema_decay=1"], "ema_decay is 1.0"),
        (["image_batch=6"], "a multiple of global_batch 8"),
        (["data.crop_px=30"], "data.crop_px is 30; use 0 for whole frames, or a multiple of 8"),
        (["data.crop_px=72"], "that fits the bucket of 64x64 px"),
        (["data.crop_px=0", "data.crops=2"], "or more where data.crop_px cuts them out"),
        (["data.bucket.height_px=60"], "multiples of 8"),
        (["optim.kind=sgd"], "use adamw or muon"),
        (["autoencoder.inflation=4D"], "use 2D, 2.5D or 3D"),
        (["autoencoder.inflation=2D"], "set autoencoder.temporal_compression=1"),
    ],
)
def test_settings_that_do_not_serve_are_refused_with_what_to_change(settings, says):
    with pytest.raises(ValueError, match=says):
        override(recipes.get("tae.tiny"), settings)


def test_a_transformer_trains_with_adamw():
    with pytest.raises(ValueError, match=r"set optim\.kind=adamw"):
        override(recipes.get("tiny.t2i"), ["optim.kind=muon"])


def test_what_a_run_reads_is_looked_for_before_it_starts(tmp_path):
    """In the order in which they are read. Seen to catch: a missing start found by eight ranks at once."""
    recipe = replace(recipes.get("tae.joint"), output=str(tmp_path / "out"))
    manifest, vgg, start = tmp_path / "manifest.parquet", tmp_path / "vgg.pth", tmp_path / "start"
    recipe = replace(
        recipe,
        data=replace(recipe.data, manifest=str(manifest)),
        loss=replace(recipe.loss, vgg_weights=str(vgg)),
        init_from=str(start),
    )
    with pytest.raises(ValueError, match="a manifest, or one video file"):
        check_inputs(recipe)
    manifest.touch()
    with pytest.raises(ValueError, match=r"VGG16, whose weights .* by loss\.perceptual=0"):
        check_inputs(recipe)
    vgg.touch()
    with pytest.raises(ValueError, match="folder of diffusers' AutoencoderKL, or to nothing"):
        check_inputs(recipe)
    start.mkdir()
    for name in ("config.json", "recipe.yaml"):
        (start / name).touch()
        check_inputs(recipe)
        (start / name).unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").touch()
    check_inputs(recipe)  # it goes on from its own checkpoint


def test_parts_that_are_off_need_nothing():
    losses = AutoencoderLosses()
    assert losses.perceptual == losses.adversarial == 0 and losses.outlier == 1e5
    assert DiscriminatorSettings().frames and Optim(learning_rate=1.0).kind == "adamw"
