"""Parameters a rank holds by the planner against those of models built on as many tensor ranks."""

from dataclasses import replace

import pytest
import tiny
from ranks import run_on_ranks

from nemo_moviegen.layout import Layout
from nemo_moviegen.planning.weights import CUT_BY_TENSOR, held_by_tensor_rank
from nemo_moviegen.sizes import VIDEO_TINY
from nemo_moviegen.video.model import VideoTransformer, video_config
from parallel.steps import join_groups

SIZES = {
    "with norms": tiny.SIZE,
    "without": replace(tiny.SIZE, qk_norm=False, cross_attention_norm=False),
    "plain FFN": replace(tiny.SIZE, gated_ffn=False),
    "tiny": replace(VIDEO_TINY, num_heads=4, num_layers=2),
}


def held(size, tensor):
    """(parameters of this rank, those of them that are cut)"""
    layout = Layout(tensor=tensor)
    join_groups(layout)
    model = VideoTransformer(video_config(size, layout, "fp32"))
    is_cut = {name: getattr(p, "tensor_model_parallel", False) for name, p in model.named_parameters()}
    return (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for name, p in model.named_parameters() if is_cut[name]),
    )


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_each_tensor_rank_holds_what_the_planner_says(size, tensor):
    counts = held_by_tensor_rank(size, tensor)
    cut = sum(counts[name] for name in CUT_BY_TENSOR)
    for whole, cut_here in run_on_ranks(held, size, tensor, world_size=tensor):
        assert whole == sum(counts.values())
        assert tensor == 1 or cut_here == cut
