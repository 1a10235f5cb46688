"""`moviegen bench steps`: our training step beside the same block in plain PyTorch and diffusers' Wan block.

All train in fp32 with AdamW and clipped gradients on batches of one shape. Ours is `training.run.train`
itself: NeMo's trainer, megatron's blocks and optimiser, the loader, the guard, the metrics file. The others
are loops that do no more than they must: the batch lies in memory, the noise comes from one generator, AdamW
is torch's fused one.

Wan's block has a GELU feed-forward of two matrices, LayerNorms, biases and rotary positions: it is as wide
and as deep as ours and sees as many tokens; its feed-forward is half as wide again, so that both have as many
parameters.
"""

import importlib
import itertools
import pkgutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nemo_moviegen.bench.measure import empty_table, environment, with_failures, write_json
from nemo_moviegen.bench.turns import in_turns
from nemo_moviegen.data.random_latents import write_random_latents
from nemo_moviegen.recipe import LatentData, Optim, VideoRecipe
from nemo_moviegen.sizes import VIDEO_TINY

OURS = "moviegen train"
"""What ratios are taken to."""
PLAIN = "plain PyTorch"
WAN = "diffusers Wan"
CASES = {
    "demo": {"size": VIDEO_TINY, "latent_shape": (2, 8, 8), "batch": 16, "steps_a_turn": 10},
    "mid": {
        "size": replace(VIDEO_TINY, name="video_mid", width=512, ffn_width=1408, num_heads=8),
        "latent_shape": (8, 32, 32),
        "batch": 1,
        "steps_a_turn": 1,
    },
}
"""demo: a rank's share of `tiny.t2iv`; mid: 512 wide, 2,048 tokens."""
PARTS = tuple(CASES)
_TEXT_TOKENS = 12
"""Of each encoder, in every prompt."""
_SAMPLES = 48
_WARM_UP_TURNS = 3


def bench_steps(parts=PARTS, *, turns=12, output=None, log=print) -> dict:
    """Run the parts and print a table for each as it ends; everything found, also in the JSON `output`.

    As many threads as torch takes: OMP_NUM_THREADS.
    """
    _import_what_runs_need()
    found = {"environment": environment("megatron-core", "nemo-toolkit", "diffusers")}
    found["environment"]["threads"] = torch.get_num_threads()
    log(f"{found['environment']['processor']}, {found['environment']['threads']} threads, fp32")
    for part in parts:
        found[part] = bench_case(CASES[part], turns)
        log(steps_table(part, found[part]))
    if output:
        write_json(output, found)
    return found


def bench_case(case, turns=12) -> dict:
    """{"rows": ..., "failed": {name: reason}} and what was trained.

    A row: name, parameters; step_seconds, the median over all steps; growth_mib, by how much resident memory
    exceeded at most what it was before the model was built; ratio, the median over turns of our median step
    to this way's: 1.1 means that ours takes 10% longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder, "latents")
        rng = np.random.default_rng(0)
        what = {"shapes": (case["latent_shape"],), "images": False, "num_tokens": _TEXT_TOKENS}
        write_random_latents(latents, case["size"], _SAMPLES, rng, **what)
        ways = {
            OURS: lambda turn: _ours(case, Path(folder), turn),
            PLAIN: lambda turn: _loop(case, turn, *_plain(case)),
            WAN: lambda turn: _loop(case, turn, *_wan(case)),
        }
        steps = case["steps_a_turn"]
        found, failed = in_turns(ways, turns=turns, steps=steps, warm_up=_WARM_UP_TURNS)
    ours = _medians(found.get(OURS))
    rows = [
        {"name": name, **one.facts}
        | {"step_seconds": statistics.median(itertools.chain(*one.step_seconds))}
        | {"growth_mib": one.growth_mib}
        | _ratios(ours, _medians(one))
        for name, one in found.items()
    ]
    size = case["size"]
    facts = {"width": size.width, "layers": size.num_layers, "latent_shape": list(case["latent_shape"])}
    facts |= {"tokens": size.num_tokens(case["latent_shape"]), "batch": case["batch"]}
    return facts | {"turns": turns, "steps_a_turn": steps, "rows": rows, "failed": failed}


def steps_table(title, found):
    """A rich table of what `bench_case` found."""
    what = f"{found['batch']} x {found['tokens']:,} tokens, {found['width']} wide, {found['layers']} layers"
    title = f"training steps, {title}: {what}; {found['turns']} turns of {found['steps_a_turn']} steps"
    headings = ("params", "ms a step", "peak MiB over libraries", "ours / this")
    made = empty_table(title, "way", *headings)
    for row in found["rows"]:
        made.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['step_seconds'] * 1e3:,.1f}",
            f"{row['growth_mib']:,.0f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    return with_failures(made, found["failed"])


def _medians(turns):
    return [] if turns is None else [statistics.median(turn) for turn in turns.step_seconds]


def _ratios(ours, theirs):
    if not ours:
        return {"ratio": None, "ratios": []}
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios]}


def _ours(case, folder, turn):
    import lightning.pytorch as pl

    from nemo_moviegen.training.run import train

    class TakesTurns(pl.Callback):
        def on_train_start(self, trainer, module):
            turn.facts = {"parameters": sum(parameter.numel() for parameter in module.parameters())}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = not turn.step_done()

    frames, height, width = case["latent_shape"]
    recipe = VideoRecipe(
        name="bench",
        cluster="cpu_2",
        size=case["size"],
        data=LatentData(folder=str(folder / "latents"), image_every=0),
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        optim=Optim(learning_rate=1e-3),
        global_batch=case["batch"],
        micro_batch=case["batch"],
        num_steps=1_000_000,
        save_every=0,
        precision="fp32",
        output=str(folder / "run"),
    )
    train(recipe, also=[TakesTurns()])


def _loop(case, turn, model, loss_of):
    """Training that does no more than it must, until the last turn is over."""
    size, (T, H, W), B = case["size"], case["latent_shape"], case["batch"]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, B, T, size.input_channels, H, W, generator=generator)
    features = [torch.randn(B, _TEXT_TOKENS, c.width, generator=generator) for c in size.contexts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    turn.facts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for latent_BTCHW in itertools.cycle(latents):
        noise_BTCHW = torch.randn(latent_BTCHW.shape, generator=generator)
        t_B = torch.rand(B, generator=generator)
        t = t_B.view(B, 1, 1, 1, 1)
        noisy_BTCHW = t * latent_BTCHW + (1 - t) * noise_BTCHW
        loss = loss_of(model, noisy_BTCHW, t_B, features, latent_BTCHW - noise_BTCHW)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        if not turn.step_done():
            return


def _plain(case):
    """(model, loss of it) for `_loop`; likewise below."""
    from nemo_moviegen.bench.plain import PlainTransformer
    from nemo_moviegen.video.embeddings import patchify

    masks = [torch.ones(case["batch"], _TEXT_TOKENS, dtype=torch.bool) for _ in case["size"].contexts]

    def loss_of(model, noisy_BTCHW, t_B, features, target_BTCHW):
        velocity_SBX = model(noisy_BTCHW, t_B, features, masks)
        return (velocity_SBX - patchify(target_BTCHW, model.size)).square().mean()

    model = PlainTransformer(case["size"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model, loss_of


def _wan(case):
    from diffusers import WanTransformer3DModel

    size = case["size"]
    widest = max(context.width for context in size.contexts)

    def loss_of(model, noisy_BTCHW, t_B, features, target_BTCHW):
        as_wide = [torch.nn.functional.pad(x, (0, widest - x.shape[-1])) for x in features]
        text = torch.cat(as_wide, dim=1)
        (velocity_BCTHW,) = model(noisy_BTCHW.transpose(1, 2), 1000 * t_B, text, return_dict=False)
        return (velocity_BCTHW.transpose(1, 2) - target_BTCHW).square().mean()

    model = WanTransformer3DModel(
        patch_size=(size.patch_frames, size.patch_height, size.patch_width),
        num_attention_heads=size.num_heads,
        attention_head_dim=size.head_width,
        in_channels=size.input_channels,
        out_channels=size.output_channels,
        text_dim=widest,
        freq_dim=size.time_frequencies,
        ffn_dim=size.ffn_width * 3 // 2,
        num_layers=size.num_layers,
        cross_attn_norm=size.cross_attention_norm,
    )
    return model, loss_of


def _import_what_runs_need():
    """Before the ways are forked: what libraries take is no part of a way's memory."""
    from diffusers import WanTransformer3DModel  # noqa: F401

    from nemo_moviegen.training.cpu import stand_in_for_cuda

    stand_in_for_cuda()
    from nemo_moviegen import training

    for module in pkgutil.iter_modules(training.__path__):
        importlib.import_module(f"{training.__name__}.{module.name}")
