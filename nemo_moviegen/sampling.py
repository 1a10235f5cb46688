"""From noise to frames (Movie Gen s3.4): what `generate` and the samples of a training run share.

Axis letters: B clips, T frames, C channels, H W height and width. t = 0 is noise, t = 1 is data.
"""

import torch

from nemo_moviegen import flow


def sample_latents(velocity, noise_BTCHW, prompt, empty, *, schedule, guidance_scale, progress=None):
    """Euler from noise (t = 0) to data (t = 1) with classifier-free guidance (s3.4); returns x_BTCHW.

    `prompt` and `empty` are (contexts, masks) of `pad_contexts`; both halves go through
    `velocity(x_BTCHW, t_B, contexts, masks)` as one batch, the prompted half first.
    """
    batch = len(noise_BTCHW)
    contexts, masks = (
        tuple(torch.cat(pair) for pair in zip(*both, strict=True)) for both in zip(prompt, empty, strict=True)
    )

    def guided(x_BTCHW, t_B):
        t_B = t_B.double()  # as in training: Megatron rounds fp32 arguments to bf16
        both = velocity(torch.cat([x_BTCHW, x_BTCHW]), torch.cat([t_B, t_B]), contexts, masks)
        return flow.guide(both[:batch], both[batch:], guidance_scale)

    return flow.sample(guided, noise_BTCHW, schedule, progress=progress)


def decode(autoencoder, latent_TCHW, mean_C, std_C, num_frames, tiling=None):
    """Frames of a normalised latent, [t, 3, H, W] in [-1, 1] on the CPU, a few at a time."""
    from nemo_moviegen.tae.tiling import Tiling, decode_frames

    raw_TCHW = latent_TCHW.float() * std_C.view(1, -1, 1, 1) + mean_C.view(1, -1, 1, 1)
    device = next(autoencoder.parameters()).device
    for frames_BTCHW in decode_frames(autoencoder, raw_TCHW[None].to(device), num_frames, tiling or Tiling()):
        yield frames_BTCHW[0].clamp(-1, 1).cpu()


def keeping(chunks, numbers, kept):
    """The chunks; the frames of these numbers are appended to `kept` as they pass."""
    start = 0
    for chunk in chunks:
        kept += [chunk[n - start].clone() for n in numbers if start <= n < start + len(chunk)]
        start += len(chunk)
        yield chunk
