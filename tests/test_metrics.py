"""PSNR, SSIM, FID and outlier norms against scikit-image, closed forms and the training loss."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nemo_moviegen.evaluation.features import find_features
from nemo_moviegen.evaluation.frechet import Moments, fid, frechet_distance
from nemo_moviegen.evaluation.metrics import MOST_PSNR_DB, outlier_norms, outlier_summary, psnr, ssim
from nemo_moviegen.tae.losses import outlier_penalty


def pair(noise=0.1, shape=(6, 3, 33, 41)):
    """A smooth video with a flat part, and a noisy copy that leaves [-1, 1] here and there."""
    generator = torch.Generator().manual_seed(0)
    T, _, H, W = shape
    video = torch.zeros(shape)
    video += torch.linspace(-1, 1, W) * torch.linspace(0, 1, T)[:, None, None, None]
    video[..., : H // 2, :] = 0.9
    return video + noise * torch.randn(shape, generator=generator), video


@pytest.mark.parametrize("noise", [0.002, 0.1, 0.8])
def test_psnr_and_ssim_are_those_of_scikit_image(noise):
    """Seen to catch: SSIM with windows over the border, PSNR with a range of 1, SSIM in float32, no clamp."""
    rebuilt, video = pair(noise)
    clamped = [frame.clamp(-1, 1).double().numpy() for frame in rebuilt]
    frames = [frame.double().numpy() for frame in video]
    options = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssims = [
        structural_similarity(a, b, data_range=2.0, **options) for a, b in zip(frames, clamped, strict=True)
    ]
    psnrs = [peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(frames, clamped, strict=True)]
    np.testing.assert_allclose(ssim(rebuilt, video).numpy(), ssims, rtol=0, atol=1e-6)
    np.testing.assert_allclose(psnr(rebuilt, video).numpy(), psnrs, rtol=0, atol=1e-6)


def test_equal_frames_have_the_highest_values():
    _, video = pair()
    assert psnr(video, video).tolist() == [MOST_PSNR_DB] * 6
    torch.testing.assert_close(ssim(video, video), torch.ones(6, dtype=torch.float64))


def test_frames_that_cannot_be_compared_are_refused():
    _, video = pair()
    with pytest.raises(ValueError, match="same frames"):
        psnr(video[:5], video)
    with pytest.raises(ValueError, match=r"8x8 px are smaller than SSIM's window of 11x11"):
        ssim(video[..., :8, :8], video[..., :8, :8])


def features(count, mean, deviations, seed=0):
    """float64 [N, D] whose sample mean and covariance are exactly these, the covariance diagonal."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(count, len(deviations)))
    basis, _ = np.linalg.qr(drawn - drawn.mean(axis=0))
    return torch.from_numpy(basis * np.sqrt(count - 1) * deviations + mean)


def test_fid_of_gaussians_has_the_closed_form():
    """Diagonal covariances: squared distances of means and of deviations. Seen to catch: the cross term once
    instead of twice, covariances divided by N."""
    mean, other = np.array([1.0, -2, 0, 5]), np.array([0.5, -2, 3, 4])
    wide, narrow = np.array([1.0, 2, 3, 0.5]), np.array([2.0, 2, 1, 0.1])
    expected = ((mean - other) ** 2).sum() + ((wide - narrow) ** 2).sum()
    real, fake = features(50, mean, wide), features(70, other, narrow, seed=1)
    assert fid(real, fake) == pytest.approx(expected, rel=1e-12)
    assert fid(fake, real) == pytest.approx(expected, rel=1e-12)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q  # no axis is special
    assert fid(real @ turn, fake @ turn) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [5, 400])
def test_fid_of_equal_sets_is_zero(count):
    """Also with fewer frames than features. Seen to catch: the cross term once instead of twice."""
    real = torch.randn(count, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 7
    assert fid(real, real) < 1e-10
    assert fid(real, real.flip(0)) < 1e-10


def test_fid_of_few_frames_is_exact():
    """Two sets that vary in unlike directions share nothing: their traces add up. Seen to catch: directions
    that are zero up to rounding kept."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64, generator=generator)).Q
    real, fake = (torch.randn(20, 96, dtype=torch.float64, generator=generator) for _ in range(2))
    real[:, :48], fake[:, 48:] = 0, 0
    expected = (real.mean(0) - fake.mean(0)).square().sum() + real.var(0).sum() + fake.var(0).sum()
    assert fid(real @ turn, fake @ turn) == pytest.approx(float(expected), rel=1e-12)


def test_fid_agrees_with_torchmetrics_where_that_is_exact():
    from torchmetrics.image.fid import _compute_fid

    generator = torch.Generator().manual_seed(3)
    real, fake = (torch.randn(300, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    fake = fake @ torch.randn(12, 12, dtype=torch.float64, generator=generator) + 0.3
    expected = _compute_fid(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
    assert fid(real, fake) == pytest.approx(float(expected), rel=1e-9)


def test_moments_of_parts_are_those_of_the_whole():
    """With a mean a million deviations from zero. Seen to catch: the step between means left out."""
    whole = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
    whole[40:] += 2
    parts = [Moments.of(part) for part in whole.split([1, 39, 20])]
    joined, direct = parts[0] + parts[1] + parts[2], Moments.of(whole)
    assert joined.count == 60
    torch.testing.assert_close(joined.mean_D, direct.mean_D, rtol=1e-12, atol=0)
    torch.testing.assert_close(joined.scatter_DD, direct.scatter_DD, rtol=1e-7, atol=1e-6)
    assert frechet_distance(joined, direct) < 1e-6


def test_fid_that_has_no_value_is_refused():
    vectors = torch.randn(4, 3)
    with pytest.raises(ValueError, match="FID of 1 frames"):
        fid(vectors[:1], vectors)
    with pytest.raises(ValueError, match="3 and 2 numbers"):
        fid(vectors, vectors[:, :2])
    with pytest.raises(ValueError, match="NaN or infinity"):
        fid(vectors, vectors * float("nan"))


def test_outlier_norms_are_those_of_equation_1():
    """By a loop over one location at a time, and by the loss: its mean excess over 3 is the same. Seen to
    catch: the norm over channels taken of quotients, deviations with N - 1, statistics over frames too."""
    latent = torch.randn(2, 3, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latent = latent * torch.tensor([1.0, 5, 0.1, 2, 3])[:, None, None] + torch.arange(3)[:, None, None, None]
    latent[1, 2, :, 4, 5] += 60
    norms = outlier_norms(latent)
    assert norms.shape == (2, 3, 6, 7)
    frame = latent[1, 2].flatten(1)
    std = (frame - frame.mean(1, keepdim=True)).square().mean(1).sqrt()
    expected = (latent[1, 2, :, 4, 5] - frame.mean(1)).norm() / std.norm()
    assert float(norms[1, 2, 4, 5]) == pytest.approx(float(expected), rel=1e-12)
    assert norms.argmax() == norms[0].numel() + 2 * 42 + 4 * 7 + 5
    stds = latent.var(dim=(3, 4), unbiased=False).sum(dim=2).sqrt()[..., None, None]
    excess = ((norms - 3).clamp(min=0) * stds).mean()
    torch.testing.assert_close(excess, outlier_penalty(latent))
    found = outlier_summary(latent.float())
    assert found["largest_norm"] == pytest.approx(float(expected), rel=1e-6)
    assert found["outlier_share"] == pytest.approx(float((norms > 3).double().mean()))
    assert found["outlier_penalty"] == pytest.approx(float(excess), rel=1e-5)
    assert found["norm_p999"] == pytest.approx(float(np.quantile(norms, 0.999)), rel=1e-5)


def test_constant_latents_have_no_outlier():
    assert outlier_norms(torch.full((1, 2, 4, 3, 3), 5.0)).abs().max() == 0


def test_random_features_are_the_same_everywhere_and_tell_blur():
    """Golden values: another network under the same name would make FIDs of two machines incomparable."""
    _, video = pair(shape=(8, 3, 32, 32))
    one, two = find_features("random"), find_features("random")
    assert one.name == "random" and not one.is_comparable
    found = one(video)
    assert found.shape == (8, 112) and torch.equal(found, two(video))
    torch.testing.assert_close(
        found[3, [0, 50, 111]], torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-4, atol=1e-5
    )
    noisy = (video + 0.2 * torch.randn(video.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    assert fid(found, one(noisy)) > 10 * fid(found, one((video + 0.01).clamp(-1, 1)))


GOLDEN = [-0.09406555, 0.35592616, 0.00632572]


class Means(torch.nn.Module):
    """Mean and largest value of each colour of what has to come in bytes."""

    def forward(self, frames, return_features: bool = False):
        assert frames.dtype == torch.uint8
        frames = frames.float()
        means = frames.mean(dim=(2, 3))
        return torch.cat((means, frames.amax(dim=(2, 3))), dim=1) if return_features else means[:, :1]


class Plain(torch.nn.Module):
    def forward(self, frames):
        return frames.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_features_come_from_a_file(tmp_path):
    """TorchScript with and without a switch for features, and an exported program. Seen to catch: classes
    taken for features."""
    frames = torch.linspace(-1.2, 1.2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    bytes_NCHW = ((frames.clamp(-1, 1) + 1) * 127.5).round()
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    found = find_features(str(tmp_path / "means.pt"))
    assert found.is_comparable and found.name.startswith("means.pt ")
    expected = torch.cat((bytes_NCHW.mean(dim=(2, 3)), bytes_NCHW.amax(dim=(2, 3))), dim=1).double()
    torch.testing.assert_close(found(frames), expected, rtol=1e-5, atol=1e-4)
    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    means = find_features(str(tmp_path / "plain.pt"))(frames)
    torch.testing.assert_close(means, expected[:, :3], rtol=1e-5, atol=1e-4)
    batch = {0: torch.export.Dim("n", min=1, max=64)}
    program = torch.export.export(
        Plain(), (torch.zeros(2, 3, 16, 16, dtype=torch.uint8),), dynamic_shapes=(batch,)
    )
    torch.export.save(program, tmp_path / "plain.pt2")
    torch.testing.assert_close(find_features(str(tmp_path / "plain.pt2"))(frames), means)


def as_classes(frames):
    return frames.float().flatten(1)[0]


def as_means(frames):
    return frames.float().mean(dim=(2, 3))


def test_features_come_from_a_module():
    found = find_features(f"{__name__}:as_means")
    assert found.name == f"{__name__}:as_means"
    assert found(torch.zeros(40, 3, 8, 8)).shape == (40, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inception.pt", "no such file; use random"),
        (f"{__name__}:nothing", "has no attribute"),
        ("no_such_module:f", "No module named"),
        (f"{__name__}:GOLDEN", "is a list, not a function"),
        (__file__, "neither TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_features_that_are_none_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        find_features(name)


def test_a_network_that_returns_no_features_is_refused():
    with pytest.raises(ValueError, match=r"\(192,\) came back .* uint8 \[N, 3, H, W\] .* to \[N, D\]"):
        find_features(f"{__name__}:as_classes")(torch.zeros(2, 3, 8, 8))
