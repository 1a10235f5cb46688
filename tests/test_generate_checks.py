"""What `generate` refuses before any model is loaded."""

from dataclasses import replace

import pytest

from nemo_moviegen.generation.checks import (
    check_fits,
    check_folder,
    check_prompts,
    check_writable,
    find_bucket,
    latent_size,
)
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.recipe import recipe_yaml
from nemo_moviegen.sizes import VIDEO_TINY
from recipes import tae, tiny


def test_latent_sizes():
    assert latent_size(16, 64, 96) == (2, 8, 12)
    assert latent_size(1, 64, 64) == (1, 8, 8)
    assert latent_size(17, 16, 16) == (3, 2, 2)


@pytest.mark.parametrize(
    ("size", "words"),
    [((0, 64, 64), "num_frames"), ((16, 72, 64), "height_px is 72"), ((16, 64, 0), "width_px")],
)
def test_sizes_the_model_cannot_make_are_refused(size, words):
    with pytest.raises(ValueError, match=words):
        latent_size(*size)


@pytest.mark.parametrize("prompts", [[], "a prompt", ["fine", "  "]])
def test_missing_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="prompt"):
        check_prompts(prompts)


def test_a_bucket_is_found_by_set_and_shape():
    assert find_bucket("video_768/256x576x1024") == Bucket(
        num_frames=256, height_px=576, width_px=1024, fps=16
    )
    with pytest.raises(ValueError, match="no buckets called 'video_99'"):
        find_bucket("video_99/1x2x3")
    with pytest.raises(ValueError, match="video_256 have no shape '256x100x100'; use video_256/1x256x256"):
        find_bucket("video_256/256x100x100")


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"latents folder .*nowhere does not exist"):
        check_folder("latents", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty"):
        check_folder("latents", tmp_path)


def write_recipe(folder, recipe):
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))


def test_a_latent_beyond_the_position_tables_is_refused(tmp_path):
    write_recipe(tmp_path, tiny.t2iv())
    check_fits(tmp_path, (VIDEO_TINY.max_frames, 8, 8))
    with pytest.raises(ValueError, match=f"needs {VIDEO_TINY.max_frames + 1} positions"):
        check_fits(tmp_path, (VIDEO_TINY.max_frames + 1, 8, 8))
    write_recipe(tmp_path, replace(tiny.t2iv(), size=replace(VIDEO_TINY, max_frames=3)))
    with pytest.raises(ValueError, match="needs 8 positions, video_tiny has 3"):
        check_fits(tmp_path, (8, 8, 8))


def test_a_folder_without_a_video_recipe_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe\.yaml"):
        check_fits(tmp_path, (1, 8, 8))
    write_recipe(tmp_path, tae.tiny())
    with pytest.raises(ValueError, match=r"a run of tae\.tiny, which is no video model"):
        check_fits(tmp_path, (1, 8, 8))


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        check_writable(tmp_path / "taken")
