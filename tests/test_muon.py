"""Muon: updates that are orthogonal, AdamW where there is no matrix, and a state that goes on."""

import copy

import pytest
import torch
from torch import nn

from nemo_moviegen.training.muon import Muon, orthogonal, split


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 16, 3), nn.Conv1d(16, 4, 3)
    ).double()


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_directions_and_levels_their_sizes(shape):
    """Against the decomposition it avoids. Seen to catch: the tall matrix not turned."""
    generator = torch.Generator().manual_seed(0)
    scale_N11 = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(3, 1, 1)
    matrices_NOI = scale_N11 * torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    for matrix, levelled in zip(matrices_NOI, orthogonal(matrices_NOI), strict=True):
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        found = u.T @ levelled @ vt.T
        sizes = found.diagonal()
        assert ((sizes > 0.6) & (sizes < 1.3)).all()
        assert (found - torch.diag(sizes)).abs().max() < 1e-10


def test_what_is_no_matrix_is_updated_as_adamw_does():
    """Biases, norms, weights from three colours, with a decay. Seen to catch: no bias correction."""
    ours, theirs = network(), network()
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    mine = Muon(ours.parameters(), **settings)
    adam = torch.optim.AdamW(theirs.parameters(), **settings)
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        adam.step()
    matrices, others = split(ours.parameters())
    assert [tuple(m.shape) for m in matrices] == [(16, 8, 3, 3), (4, 16, 3)]
    pairs = {id(a): b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)}
    for parameter in others:
        torch.testing.assert_close(parameter, pairs[id(parameter)], rtol=0, atol=1e-12)
    assert not torch.allclose(matrices[0], pairs[id(matrices[0])], atol=1e-3)


def test_a_matrix_moves_as_far_as_adamw_would_move_it():
    """Root mean square 0.2 of the learning rate, whatever the gradient's size. Seen to catch: no scaling."""
    for factor in (1e-4, 1e4):
        ours = network()
        before = copy.deepcopy(ours[2].weight.data)
        gradients(ours, 0)
        for parameter in ours.parameters():
            parameter.grad *= factor
        Muon(ours.parameters(), 1e-2).step()
        moved = (ours[2].weight.data - before).square().mean().sqrt()
        assert 0.15e-2 < moved < 0.25e-2


def test_matrices_of_one_shape_learn_as_each_does_alone():
    """Batched by shape. Seen to catch: one norm for all of a shape, updates handed out in another order."""
    torch.manual_seed(0)
    together = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)), nn.Linear(8, 24)).double()
    alone = copy.deepcopy(together)
    optimizer = Muon(together.parameters(), 1e-2)
    optimizers = [Muon(layer.parameters(), 1e-2) for layer in alone]
    for step in range(3):
        for net in (together, alone):
            gradients(net, step)
            for factor, layer in enumerate(net, start=1):
                layer.weight.grad *= factor**4
        for one in (optimizer, *optimizers):
            one.step()
    for mine, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_its_state_goes_on_where_it_was():
    whole, half = network(), network()
    first, second = Muon(whole.parameters(), 1e-2), Muon(half.parameters(), 1e-2)
    for step in range(4):
        if step == 2:  # as a resumed run does
            state = copy.deepcopy(second.state_dict())
            second = Muon(half.parameters(), 1e-2)
            second.load_state_dict(state)
        for net, optimizer in ((whole, first), (half, second)):
            gradients(net, step)
            optimizer.step()
    for mine, theirs in zip(half.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_parameters_without_a_gradient_stay():
    net = network()
    before = copy.deepcopy(net.state_dict())
    Muon(net.parameters(), 1e-2, weight_decay=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
