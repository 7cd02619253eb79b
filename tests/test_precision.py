"""The floating-point type that serves: chosen by time, and never at the price of another target."""

import pytest
import torch

from support.precision import ready_to_serve
from tests.tiny import tiny_target

TYPES = torch.float32, torch.bfloat16


def weights(target):
    return {name: p.detach().clone() for name, p in target.named_parameters()}


def test_auto_rounds_no_weight():
    """Weights that bfloat16 holds may serve in it; if a single one is not, none does."""
    target = tiny_target().bfloat16().float()
    before = weights(target)
    served = ready_to_serve(target, "cpu", "auto")
    assert {p.dtype for p in served.parameters()} < set(TYPES) and not served.training
    assert all(torch.equal(p.float(), before[name]) for name, p in weights(served).items())
    target = tiny_target().bfloat16().float()
    with torch.no_grad():
        target.model.norm.weight[0] = 1 + 2**-12
    before = weights(target)
    served = ready_to_serve(target, "cpu", "auto")
    assert all(torch.equal(p, before[name]) for name, p in weights(served).items())


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_asked_for_serves(dtype):
    served = ready_to_serve(tiny_target(), "cpu", str(dtype).removeprefix("torch."))
    assert {p.dtype for p in served.parameters()} == {dtype}
