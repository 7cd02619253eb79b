"""The estimators at their edges; the theorems about them stand in test_aurora.py."""

import pytest
import torch

from rl import ESTIMATORS, terms, policy_gradient_loss
from support import options
from verify import RULES


def test_the_command_line_offers_every_rung():
    assert set(options.ESTIMATORS) == {*ESTIMATORS, "kl"}


@pytest.mark.parametrize("name", [*ESTIMATORS, "kl"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_pads_change_nothing_and_gradients_are_finite(name, rule, temperature, R=6, K=4, V=7):
    """A shorter chain is as if its pads were not there; ids that one side or both cannot say, and
    targets that are nearly certain, give finite gradients."""
    g = torch.Generator().manual_seed(0)
    draft = (3 * torch.randn(R, K, V, generator=g)).requires_grad_()
    target = 30 * torch.randn(R, K, V, generator=g)
    target[..., 0] = float("-inf")
    cut = draft.masked_fill(torch.arange(V) < 2, float("-inf"))
    tokens = torch.randint(2, V, (R, K), generator=g)
    tokens[:, 2:] = -1
    for behaviour in ("draft", "target"):
        losses = []
        for width in (2, K):
            loss = policy_gradient_loss(cut[:, :width], target[:, :width], tokens[:, :width],
                                        temperature, name, behaviour, rule)
            gradient, = torch.autograd.grad(loss, draft, retain_graph=True)
            assert loss.isfinite() and gradient.isfinite().all()
            losses.append((loss, gradient))
        if behaviour == "target" or name not in ("reinforce", "expected"):  # a baseline knows K
            torch.testing.assert_close(losses[0], losses[1])


def test_from_the_targets_tokens_the_weight_is_a_running_minimum(R=50, K=5, V=6):
    """U_j = min(1, Q_1, .., Q_j) under the block rule, and the product of the minima under the
    token rule."""
    g = torch.Generator().manual_seed(0)
    draft, target = torch.randn(2, R, K, V, generator=g).double()
    tokens = torch.randint(V, (R, K), generator=g)
    ids = tokens[..., None]
    log_q, log_p = (z.log_softmax(-1).gather(-1, ids)[..., 0] for z in (draft, target))
    block = terms(draft, target, tokens, 1.0, "target", "block").U
    wanted = (log_q - log_p).cumsum(1).exp().cummin(1).values.clamp(max=1)
    torch.testing.assert_close(block, wanted)
    token = terms(draft, target, tokens, 1.0, "target", "token").U
    torch.testing.assert_close(token, (log_q - log_p).exp().clamp(max=1).cumprod(1))
