"""FID: Frechet distance of two sets of frames in the space of a network's features (Heusel et al. 2017).

    FID = ||m1 - m2||^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))        m means, S covariances of N frames

Each set is kept as its moments, so that frames can come one clip at a time and from several ranks. The number
depends on the network as much as on the frames: its name belongs beside it. And it depends on N: between
small samples it is too large, so only sets of equally many frames compare.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Number, mean and summed outer products about the mean of feature vectors; float64, on the CPU."""

    count: int
    mean_D: Tensor
    scatter_DD: Tensor

    @classmethod
    def of(cls, features_ND) -> "Moments":
        """Moments of N vectors, N >= 1."""
        features_ND = torch.as_tensor(features_ND).double().cpu()
        mean_D = features_ND.mean(dim=0)
        centred_ND = features_ND - mean_D
        return cls(len(features_ND), mean_D, centred_ND.T @ centred_ND)

    def __add__(self, other) -> "Moments":
        """Moments of both sets together (Chan et al. 1979); sums of squares would cancel, this does not."""
        count = self.count + other.count
        step_D = other.mean_D - self.mean_D
        between_DD = torch.outer(step_D, step_D) * (self.count * other.count / count)
        mean_D = self.mean_D + step_D * (other.count / count)
        return Moments(count, mean_D, self.scatter_DD + other.scatter_DD + between_DD)


def fid(features_real_ND, features_fake_ND) -> float:
    """Frechet distance of two sets of feature vectors, float64, 0 for equal sets; symmetric.

    ValueError for fewer than two vectors, vectors of different lengths, or ones that are not finite.
    """
    return frechet_distance(Moments.of(features_real_ND), Moments.of(features_fake_ND))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """`fid` of sets whose moments are known.

    tr((S1 S2)^(1/2)) is the sum of the singular values of A^T B, where S1 = A A^T and S2 = B B^T. Other ways
    take the root of S1 S2 itself, scipy.linalg.sqrtm or, in torchmetrics, that of its eigenvalues: with fewer
    frames than features most of those are zero up to rounding, 1e-16, whose root, 1e-8, adds up over
    thousands, comes out complex, or fails. Singular values are real and lose nothing.
    """
    for moments in (real, fake):
        if moments.count < 2:
            raise ValueError(
                f"FID of {moments.count} frames: covariances need two or more; measure more clips"
            )
        if not moments.scatter_DD.isfinite().all():
            raise ValueError("FID of features that hold NaN or infinity: check the feature network")
    if real.mean_D.shape != fake.mean_D.shape:
        raise ValueError(
            f"FID between features of {len(real.mean_D)} and {len(fake.mean_D)} numbers: take both from one "
            "network"
        )
    traces = sum(float(moments.scatter_DD.trace()) / (moments.count - 1) for moments in (real, fake))
    cross = float(torch.linalg.svdvals(_factor(real).T @ _factor(fake)).sum())
    distance = float((real.mean_D - fake.mean_D).square().sum()) + traces - 2 * cross
    return max(distance, 0.0)  # equal sets end within rounding of zero, on either side


def _factor(moments):
    """[D, rank]: A with A A^T the covariance, without the directions that are zero up to rounding."""
    values_D, vectors_DD = torch.linalg.eigh(moments.scatter_DD / (moments.count - 1))
    kept = values_D > values_D[-1] * len(values_D) * torch.finfo(torch.float64).eps
    return vectors_DD[:, kept] * values_D[kept].sqrt()
