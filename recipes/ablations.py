"""The paper's comparisons at toy size: recipes that differ from the paper's way in one thing (s3.6.2, s3.2).

Each is trained on the latents of `make demo` as its video model is, images before images and video, and
keeps its checkpoints. `python benchmarks/ablations.py` trains all and counts what their samples show.
"""

from dataclasses import replace

from nemo_moviegen.recipe import VideoRecipe
from nemo_moviegen.sizes import VIDEO_TINY
from recipes import tiny

_DIT = replace(VIDEO_TINY, name="video_tiny_dit", block="dit", gated_ffn=False, ffn_width=768)
"""As wide as DiT's, four times the model, and as many weights as the SwiGLU of 512 has."""


def paper_t2i() -> VideoRecipe:
    """What all others differ from: images first (s3.2)."""
    return _images("paper")


def paper() -> VideoRecipe:
    """What all others differ from: flow matching, the LLaMa3 block, images and video after images (s3.2)."""
    return _video("paper")


def v_prediction_t2i() -> VideoRecipe:
    """Diffusion in place of flow matching (s3.6.2, Table 8): images first."""
    return _images("v_prediction", objective="v_prediction")


def v_prediction() -> VideoRecipe:
    """v-prediction with zero terminal SNR in place of flow matching (s3.6.2, Table 8)."""
    return _video("v_prediction", objective="v_prediction")


def dit_t2i() -> VideoRecipe:
    """The DiT block in place of LLaMa3's (s3.6.2, Table 9): images first."""
    return _images("dit", size=_DIT)


def dit() -> VideoRecipe:
    """The DiT block in place of LLaMa3's: LayerNorm, biases, a plain FFN with SiLU (s3.6.2, Table 9)."""
    return _video("dit", size=_DIT)


def no_images() -> VideoRecipe:
    """Images and video from fresh weights (s3.2 starts from images), as many steps as both stages take."""
    steps = tiny.t2i().num_steps + tiny.t2iv().num_steps
    return replace(_video("no_images"), init_from="", num_steps=steps)


ALL = (paper_t2i, paper, v_prediction_t2i, v_prediction, dit_t2i, dit, no_images)
KEEP_EVERY = 400
"""Steps of the video stages."""


def _images(name, **changes):
    base = replace(tiny.t2i(), name=f"ablations.{name}_t2i", output=f"out/ablations/{name}_t2i")
    return replace(base, **changes)


def _video(name, **changes):
    base = replace(
        tiny.t2iv(),
        name=f"ablations.{name}",
        output=f"out/ablations/{name}",
        init_from=f"out/ablations/{name}_t2i",
        save_every=KEEP_EVERY,
        keep_every=KEEP_EVERY,
    )
    return replace(base, **changes)
