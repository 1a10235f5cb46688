"""How much of the hardware a training step used: MFU, HFU and where its time went. No torch.

MFU divides the model's FLOPs by what the ranks could have done in the time at their dense peak. The model's
FLOPs are counted exactly, part by part (`flops.py`), and leave out what is done twice. HFU adds that: what
`layout.recompute` computes again in the backward pass. Padding counts in neither: it is no work of the model.
"""

from nemo_moviegen import flops

RECOMPUTED = {
    "none": (),
    "selective": ("ffn",),
    "full": (
        "self_attention_projections",
        "self_attention_scores",
        "cross_attention_queries",
        "cross_attention_keys_values",
        "cross_attention_scores",
        "ffn",
    ),
}
"""Components of a forward pass that the backward pass computes again, by `layout.recompute`. Full: every
layer; embeddings, modulation and head lie outside the layers."""
KERNEL_CEILING = 0.80
"""Share of the dense peak that no known kernel passes. The best we know of on an H100 are matrix products at
about 700 of 989 TFLOP/s (0.71) and attention at 648 (0.66); more than this is a mistake in counting."""


def step_flops(size, counts, recompute="none", text_tokens=flops.DEFAULT_TEXT_TOKENS) -> tuple[int, int]:
    """(model FLOPs, what is recomputed on top) of a step's samples, forward and backward, over all ranks.

    `counts` has the number of samples of each latent shape (T, H, W); an image is a shape of one frame, a
    pack the sum of its clips. `text_tokens` are the real ones of a prompt, in all or by encoder.
    """
    model = again = 0
    for shape, count in counts.items():
        forward = flops.forward_flops(size, shape, text_tokens)
        model += count * flops.TRAIN_PASSES * sum(forward.values())
        again += count * sum(forward[name] for name in RECOMPUTED[recompute])
    return model, again


def utilisation(model_flops, recomputed_flops, seconds, num_ranks, peak_tflops) -> dict[str, float]:
    """speed/tflops_per_gpu of a step and, where the peak of a rank is known (not 0), speed/mfu and speed/hfu.

    TFLOP/s are the model's, of one rank. MFU and HFU are shares of `peak_tflops`, the dense peak; above 1 as
    they come out: `counting_error` says what to think of it.
    """
    tflops = model_flops / seconds / num_ranks / 1e12
    found = {"speed/tflops_per_gpu": tflops}
    if peak_tflops > 0:
        found["speed/mfu"] = tflops / peak_tflops
        found["speed/hfu"] = tflops / peak_tflops * (model_flops + recomputed_flops) / model_flops
    return found


def counting_error(share, fastest=1.0) -> str:
    """Why an MFU or HFU can not be true; "" where it can. The `fastest` products are in peaks of the dense
    bf16: 2 in FP8."""
    if share <= KERNEL_CEILING * fastest:
        return ""
    what = "the dense peak itself" if share > 1 else f"what any known kernel reaches, {KERNEL_CEILING:.0%}"
    return (
        f"counting error: {share:.1%} of the dense peak is above {what}; check peak_dense_tflops of the "
        "cluster (data sheets print twice the dense number), the number of ranks, and the step time"
    )


def real_text_tokens(counted, num_samples) -> dict[str, float]:
    """Mean real tokens of a prompt by encoder, from {encoder: tokens of `num_samples` prompts}."""
    return {name: tokens / num_samples for name, tokens in counted.items()}
