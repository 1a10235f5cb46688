"""Patch discriminators and adversarial losses of the temporal autoencoder (Movie Gen s3.1.1)."""

import pytest
import torch

from nemo_moviegen.tae.discriminator import (
    Discriminator,
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)

EXACT = 1e-10  # float64 and half a dozen layers


def random_video(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def discriminator(temporal, *, levels=2):
    """In float64, narrow; noise on every weight, for biases of zero hide bugs."""
    torch.manual_seed(0)
    model = PatchDiscriminator(width=8, levels=levels, temporal=temporal).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("temporal", [False, True])
def test_logits_of_a_batch_are_those_of_each_clip_alone(temporal):
    """Seen to catch: batch norm in place of group norm."""
    model = discriminator(temporal)
    video = random_video(3, 4, 3, 16, 24)
    with torch.no_grad():
        alone = torch.cat([model(clip) for clip in video.split(1)])
        torch.testing.assert_close(model(video), alone, rtol=0, atol=EXACT)


def test_gradients_of_a_batch_are_the_mean_over_its_halves():
    """What data parallelism and micro-batches rely on. Seen to catch: batch norm in place of group norm."""
    model = discriminator(True)
    real, fake = random_video(4, 2, 3, 16, 16), random_video(4, 2, 3, 16, 16, seed=1)

    def gradients(*clips):
        model.zero_grad()
        for some in clips:
            (hinge_discriminator_loss([model(real[some])], [model(fake[some])]) / len(clips)).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    whole, halves = gradients(slice(0, 4)), gradients(slice(0, 2), slice(2, 4))
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def test_frames_are_judged_alone():
    """Seen to catch: frames left in the wrong axis (unflattened as [T, B])."""
    model = discriminator(False)
    video = random_video(2, 3, 3, 16, 16)
    with torch.no_grad():
        alone = torch.stack([model(video[:, t : t + 1])[:, 0] for t in range(3)], dim=1)
        torch.testing.assert_close(model(video), alone, rtol=0, atol=EXACT)


def test_clips_are_judged_by_their_order():
    """The frames that the strides keep stay. Seen to catch: a kernel of one frame in place of three."""
    model = discriminator(True)
    video = random_video(1, 8, 3, 16, 16)
    with torch.no_grad():
        logits, shuffled = model(video), model(video[:, [0, 2, 1, 3, 4, 7, 6, 5]])
    assert (logits - shuffled).abs().max() > 1e-3
    still = video[:, :1].expand(-1, 8, -1, -1, -1)
    assert (logits.mean() - model(still).mean()).abs() > 1e-3


@pytest.mark.parametrize("frame", [0, 3, 4, 7])
def test_every_frame_of_a_clip_and_both_neighbours_count(frame):
    """Convolutions look both ways. Seen to catch: causal padding, no padding over time."""
    model = PatchDiscriminator(width=8, levels=1, temporal=True).double()
    video = random_video(1, 8, 3, 8, 8).requires_grad_()
    first = model.layers[0](video.transpose(1, 2))  # before group norm, which mixes the whole clip
    assert first.shape[2] == 4
    for output in range(4):
        (gradient,) = torch.autograd.grad(first[:, :, output].sum(), video, retain_graph=True)
        assert (gradient[0, frame].abs().sum() > 0) == (abs(2 * output - frame) <= 1)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize(
    ("num_frames", "height", "width"), [(1, 8, 8), (2, 8, 24), (3, 9, 15), (8, 32, 32), (16, 64, 64)]
)
def test_any_length_and_any_frame_from_8_px_gives_patches(temporal, num_frames, height, width):
    """Seen to catch: 4x4 kernels where the stride is 1 (none left at 8 px), 4 frames over time (T = 1)."""
    torch.manual_seed(0)
    model = PatchDiscriminator(width=4, levels=3, temporal=temporal)
    logits = model(random_video(2, num_frames, 3, height, width).float())
    frames = -(-num_frames // 8) if temporal else num_frames
    assert logits.shape == (2, frames, height // 8, width // 8)
    assert logits.isfinite().all()


@pytest.mark.parametrize("temporal", [False, True])
def test_the_smallest_frame_still_tells_videos_apart(temporal):
    """Seen to catch: one channel a group, which norms a single pixel to zero and every video to one logit."""
    model = discriminator(temporal, levels=3)
    with torch.no_grad():
        logits = model(random_video(2, 1, 3, 8, 8))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_frame_below_one_patch_is_an_error_that_names_both_sizes():
    with pytest.raises(ValueError, match=r"24x4 px.* 8 px or more: .*larger bucket"):
        PatchDiscriminator(width=4, levels=3)(torch.zeros(1, 1, 3, 4, 24))


def test_a_seed_fixes_the_weights_and_a_fresh_one_has_no_opinion():
    """Seen to catch: torch's default initialisation."""

    def fresh(seed):
        torch.manual_seed(seed)
        return Discriminator(width=64, levels=3, frames=True, clips=True)

    a, b, c = fresh(0), fresh(0), fresh(1)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        if name.endswith("bias"):
            assert not x.any()
        else:
            assert not torch.equal(x, z)
            assert abs(x.std().item() - 0.02) < 0.005
            assert abs(x.mean().item() - (x.dim() == 1)) < 0.005
    logits = a(random_video(1, 4, 3, 32, 32).float())
    assert abs(hinge_discriminator_loss(logits, logits).item() - 1) < 0.1


def test_clips_and_frames_have_one_discriminator_each_and_an_image_is_no_clip():
    """Seen to catch: an image passed to the discriminator of clips."""
    video, image = random_video(2, 8, 3, 16, 16).float(), random_video(2, 1, 3, 16, 16).float()
    both = Discriminator(4, 2, frames=True, clips=True)
    assert [tuple(logits.shape) for logits in both(video)] == [(2, 8, 4, 4), (2, 2, 4, 4)]
    assert [tuple(logits.shape) for logits in both(image)] == [(2, 1, 4, 4)]
    clips = Discriminator(4, 2, frames=False, clips=True)
    assert len(clips(video)) == 1 and clips(image) == []
    frames = Discriminator(4, 2, frames=True, clips=False)
    assert len(frames(video)) == len(frames(image)) == 1
    assert not any(name.startswith("clips") for name, _ in frames.named_parameters())
    with pytest.raises(ValueError, match="neither frames nor clips: turn on"):
        Discriminator(4, 2, frames=False, clips=False)


def test_hinge_loss_by_hand():
    """Seen to catch: no half, the signs of real and fake exchanged, patches of both discriminators pooled."""
    real = [torch.tensor([2.0, 0.5]), torch.tensor([[-1.0]])]
    fake = [torch.tensor([-3.0, 0.0]), torch.tensor([[0.5]])]
    # frames: (0 + 0.5) / 2 = 0.25 and (0 + 1) / 2 = 0.5, half of the sum 0.375; clips: 2 and 1.5, 1.75
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((0.375 + 1.75) / 2)
    assert hinge_discriminator_loss(real[:1], fake[:1]).item() == pytest.approx(0.375)


def test_generator_loss_by_hand():
    """Seen to catch: the sign, and patches of both discriminators pooled."""
    assert generator_loss([torch.tensor([-3.0, 0.0]), torch.tensor([[0.5]])]).item() == pytest.approx(0.5)


def test_nothing_judged_costs_nothing():
    """Seen to catch: the mean of an empty list, NaN."""
    assert hinge_discriminator_loss([], []).item() == 0.0
    assert generator_loss([]).item() == 0.0
    assert hinge_discriminator_loss([], []).shape == generator_loss([]).shape == ()
    (torch.ones((), requires_grad=True) + generator_loss([])).backward()  # beside another loss


def test_a_frozen_discriminator_passes_the_gradient_on_and_keeps_none():
    """Seen to catch: logits computed without a graph."""
    model = Discriminator(4, 2, frames=True, clips=True)
    video = random_video(1, 4, 3, 16, 16).float().requires_grad_()
    model.requires_grad_(False)
    generator_loss(model(video)).backward()
    assert video.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    hinge_discriminator_loss(model(video.detach()), model(-video.detach())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_discriminator_learns_to_tell_flicker_from_stillness():
    """Frames with the same look, other motion: the one of clips parts them in a few steps."""
    torch.manual_seed(0)
    model = Discriminator(8, 2, frames=False, clips=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    frames = random_video(4, 8, 3, 16, 16).float()
    still = frames[:, :1].expand_as(frames)
    for _ in range(40):
        loss = hinge_discriminator_loss(model(still), model(frames))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_adaptive_weight_by_hand():
    """Seen to catch: the ratio upside down, no clamp, no epsilon, norms of a list added."""
    three_four = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert adaptive_weight(three_four, torch.tensor([0.5])).item() == pytest.approx(5 / 0.5001)
    assert adaptive_weight(torch.tensor([0.5]), three_four).item() == pytest.approx(0.5 / 5.0001)
    nothing = torch.zeros(2)
    assert adaptive_weight(three_four, nothing).item() == 1e4  # 5e4 before the clamp
    assert adaptive_weight(nothing, three_four).item() == 0.0
    assert adaptive_weight(0.5 * torch.ones(1), nothing).item() == pytest.approx(5e3)
    assert not adaptive_weight(torch.ones(2, requires_grad=True), torch.ones(2)).requires_grad


def test_adaptive_weight_makes_both_losses_pull_equally():
    layer = torch.nn.Conv2d(4, 3, 3)
    hidden = random_video(1, 4, 8, 8).float()
    reconstruction_loss = layer(hidden).abs().mean()
    adversarial_loss = 30 * layer(hidden).square().mean()
    gradients = [
        torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    weight = adaptive_weight(*gradients)
    pulls = [torch.cat([g.flatten() for g in gradient]).norm().item() for gradient in gradients]
    assert weight.item() * pulls[1] == pytest.approx(pulls[0], rel=1e-3)


def test_gradients_under_autocast_are_numbers():
    """Seen to catch: the 3D discriminator in bfloat16 on a CPU, whose gradient holds what lay in memory."""
    torch.manual_seed(0)
    judge = Discriminator(4, 2, frames=True, clips=True)
    video = torch.rand(2, 8, 3, 32, 32) * 2 - 1
    for _ in range(6):
        del_me = [torch.full((n,), float("nan")) for n in range(1000, 300_000, 10_000)]
        del del_me  # what torch gets next is full of NaN
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = hinge_discriminator_loss(judge(video), judge(video / 2))
        for gradient in torch.autograd.grad(loss, list(judge.parameters())):
            assert gradient.isfinite().all()
