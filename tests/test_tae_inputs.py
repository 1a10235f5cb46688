"""What the autoencoder refuses, and what it says to change."""

import math
import re

import pytest
import torch
from autoencoders import small

import nemo_moviegen.recipe
from nemo_moviegen.sizes import AutoencoderSize
from nemo_moviegen.tae.checks import check_video
from nemo_moviegen.tae.model import TemporalAutoencoder

NAN = math.nan


@pytest.fixture(scope="module")
def model():
    return TemporalAutoencoder(small())


@pytest.mark.parametrize(
    ("video", "says"),
    [
        (torch.zeros(1, 4, 3, 20, 16), "multiples of 8"),
        (torch.zeros(1, 4, 3, 16, 12), "multiples of 8"),
        (torch.zeros(1, 4, 4, 16, 16), "height, width"),
        (torch.zeros(4, 3, 16, 16), "height, width"),
        (torch.zeros(1, 0, 3, 16, 16), "one frame or more"),
        (torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), "floats"),
        (torch.full((1, 4, 3, 16, 16), 255.0), r"\[-1, 1\]"),
        (torch.full((1, 4, 3, 16, 16), math.nan), "NaN"),
        (torch.full((1, 4, 3, 16, 16), -math.inf), "infinite"),
    ],
)
def test_input_that_is_no_video_is_refused_with_what_to_change(video, says, model):
    with pytest.raises(ValueError, match=says):
        model.encode(video)


@pytest.mark.parametrize(
    ("shape", "says", "change"),
    [
        ((1, 3, 9, 16, 24), "[clips, 3, frames, height, width]", lambda x: x.transpose(1, 2)),
        ((1, 9, 16, 24, 3), "[clips, frames, height, width, 3]", lambda x: x.permute(0, 1, 4, 2, 3)),
    ],
)
def test_another_order_of_channels_is_recognised_and_the_advice_mends_it(shape, says, change):
    """Seen to catch: the two pieces of advice exchanged."""
    video = torch.zeros(shape)
    with pytest.raises(ValueError) as error:
        check_video(video)
    advice = re.search(r"x\.(\w+)\(([\d, ]+)\)$", str(error.value))
    assert f"has shape {shape}, which looks like {says}; pass [clips, frames, 3, height, width]" in str(
        error.value
    )
    mended = getattr(video, advice[1])(*map(int, advice[2].split(",")))
    assert mended.shape == change(video).shape == (1, 9, 3, 16, 24)
    check_video(mended)


def test_three_frames_in_the_right_order_are_no_other_order():
    """Seen to catch: three frames taken for colours."""
    check_video(torch.zeros(3, 3, 3, 8, 8))


@pytest.mark.parametrize(
    ("height_px", "width_px", "crop", "pad"),
    [
        (20, 16, "16x16 px", "16x24 px"),
        (16, 12, "8x16 px", "16x16 px"),
        (1080, 1916, "1912x1080 px", "1920x1080 px"),
        (719, 1279, "1272x712 px", "1280x720 px"),
    ],
)
def test_sizes_that_fit_are_named_to_crop_to_and_to_pad_to(height_px, width_px, crop, pad):
    """Width first, as the message has the video's. Seen to catch: height first in the larger size."""
    with pytest.raises(ValueError) as error:
        check_video(torch.zeros(1, 1, 3, height_px, width_px))
    says = f"video is {width_px}x{height_px} px; width and height must be multiples of 8: "
    assert says + f"crop it to {crop}, pad it to {pad}, or choose such a bucket" in str(error.value)
    for named in re.findall(r"(\d+)x(\d+) px,", str(error.value)):
        check_video(torch.zeros(1, 1, 3, int(named[1]), int(named[0])))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_frames_with_values_that_are_no_numbers_are_named(bad):
    """Of all clips. Seen to catch: the frames of the first clip alone."""
    video = torch.zeros(2, 12, 3, 8, 8)
    video[0, 3, 2, 7, 0] = video[1, 10, 0, 0, 5] = bad
    with pytest.raises(ValueError, match=r"NaN or infinite values \(frames 3, 10\): check the decoder"):
        check_video(video)


def test_of_many_bad_frames_eight_are_named():
    """Seen to catch: nine."""
    with pytest.raises(ValueError, match=r"\(frames 1, 2, 3, 4, 5, 6, 7, 8, \.\.\.\)"):
        check_video(torch.cat([torch.zeros(1, 1, 3, 8, 8), torch.full((1, 20, 3, 8, 8), NAN)], dim=1))


def test_bytes_and_their_range_are_refused_and_the_advice_mends_them():
    """Seen to catch: values of 255 let through."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"is torch.uint8; convert it to floats .*\(x / 127.5 - 1 for bytes"):
        check_video(pixels)
    with pytest.raises(ValueError, match=r"values up to 255; scale it to \[-1, 1\] \(x / 127.5 - 1"):
        check_video(pixels.float())
    check_video(pixels / 127.5 - 1)


def test_a_resizing_filter_may_overshoot_a_little():
    """Seen to catch: a limit of one."""
    check_video(torch.full((1, 1, 3, 8, 8), -1.3))
    with pytest.raises(ValueError, match="values up to 2"):
        check_video(torch.full((1, 1, 3, 8, 8), -2.0))


@pytest.mark.parametrize("num_frames", [0, 8, 17])
def test_a_length_the_latent_does_not_hold_is_refused(num_frames, model):
    with pytest.raises(ValueError, match="9 to 16 frames"):
        model.decode(torch.zeros(1, 2, 4, 2, 2), num_frames=num_frames)


def test_a_recipe_names_the_same_sizes():
    """Seen to catch: a list kept as a list."""
    assert nemo_moviegen.recipe.AutoencoderSize is AutoencoderSize
    assert AutoencoderSize(multipliers=[1, 2, 4, 4]) == AutoencoderSize()  # as a file of yaml has them


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"multipliers": (1, 2, 4)}, r"multipliers \(1, 2, 4\) need four levels"),
        ({"inflation": "2.5d"}, "inflation is '2.5d'; use 2D, 2.5D or 3D"),
        ({"temporal_compression": 3}, "temporal_compression is 3; use 8, 4, 2 or 1"),
        ({"temporal_compression": 16}, "temporal_compression is 16"),
        ({"temporal_compression": 0}, "temporal_compression is 0"),
        ({"inflation": "2D"}, "can not put 8 frames in a latent: set autoencoder.temporal_compression=1"),
        ({"temporal_kernel": 2}, "temporal_kernel is 2; use an odd number"),
        ({"temporal_kernel": -1}, "temporal_kernel is -1"),
        ({"base_width": 0}, "base_width is 0; use 1 or more"),
        ({"blocks_per_level": 0}, "blocks_per_level is 0"),
        ({"latent_channels": 0}, "latent_channels is 0"),
    ],
)
def test_sizes_no_autoencoder_has_are_refused_when_they_are_written(changes, says):
    """Seen to catch: a compression of 16 let through."""
    with pytest.raises(ValueError, match=says):
        AutoencoderSize(**changes)
