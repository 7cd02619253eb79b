"""Muon, against torch's own, which computes in bfloat16."""

import pytest
import torch

from support import optimizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_muon_is_torchs(shape, dtype, monkeypatch):
    """Ten steps on the same gradients end within bfloat16's rounding of the same weights."""
    monkeypatch.setattr(optimizers, "fast_dtype", lambda: dtype)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    start, theirs = ours.detach().clone(), torch.nn.Parameter(ours.detach().clone())
    own = optimizers.Muon([ours], lr=0.1, weight_decay=0.01)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01)
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        own.step()
        reference.step()
    assert (ours - theirs).norm() < 0.04 * (theirs - start).norm()


def test_a_step_is_orthogonal():
    """Whatever the gradient's singular values were, those of the step lie around 1."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(8, 20), full_matrices=False)
    s = torch.linalg.svdvals(optimizers.orthogonal(u @ torch.diag(0.5 ** torch.arange(8)) @ v))
    assert 0.6 < s.min() and s.max() < 1.3
