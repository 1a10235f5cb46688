"""The stand-in for CUDA: what it answers, and that its AdamW is AdamW."""

import pytest
import torch

from nemo_moviegen.training.cpu import GroupStepAdamW, stand_in_for_cuda


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_optimiser_is_adamw_with_its_step_count_in_the_group(weight_decay):
    settings = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": weight_decay}
    torch.manual_seed(0)
    ours = [torch.randn(3, 4, dtype=torch.float64).requires_grad_(), torch.zeros(5).double().requires_grad_()]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    group_step, reference = GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(6):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        group_step.step()
        reference.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-14)
    assert group_step.param_groups[0]["step"] == 6
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in group_step.state.values())


def test_cuda_names_answer_for_the_cpu():
    stand_in_for_cuda()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.tensor([1.0], pin_memory=True).to("cuda", non_blocking=True).cuda().device.type == "cpu"
    assert torch.zeros(1).type() == torch.zeros(1).double().type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert torch.zeros(1, device=torch.cuda.current_device()).device == torch.device("cpu")
    assert torch.zeros(1).to(f"cuda:{torch.cuda.current_device()}").device == torch.device("cpu")
    assert not torch.cuda.is_available()


def test_a_machine_with_cuda_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(torch.cuda, "moviegen_stand_in", raising=False)
    zeros, stream = torch.zeros, torch.cuda.Stream
    stand_in_for_cuda()
    assert torch.zeros is zeros and torch.cuda.Stream is stream
    assert not hasattr(torch.cuda, "moviegen_stand_in")
