"""Training on the likeliest ids: what it leaves out, and that at temperature 0 that is nothing."""

import pytest
import torch

from generation import Generation, Request
from rl import policy_gradient_loss
from support.draft_length import Plan
from support.likeliest import likeliest, of_likeliest
from support.trace import of_answer

from .tiny import tiny_draft, tiny_target

PLACES = torch.tensor([0, 1, 4, 9, 10])  # the last ones reach over the answer's end


def said(target, temperature):
    generation = Generation(target, None, [Request([16, 3, 5, 8], 12, 0, temperature)])
    while not generation.done:
        drafted = generation.draft_tokens(Plan())
        generation.commit(drafted, *generation.verify(drafted))
    return generation.trace()


def loss_and_gradient(draft, sides, temperature):
    draft.zero_grad()
    loss = policy_gradient_loss(*sides, temperature, "log", "target", "block")
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in draft.parameters()])


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([0, 2, 3, 7, 9, 11, 12])])
@pytest.mark.parametrize("temperature, most", [(0.0, 1), (0.0, 5), (0.7, 17)])
def test_it_is_the_loss_of_rl_at_temperature_0_and_where_no_id_is_left_out(
        vocabulary, temperature, most):
    target = tiny_target(gain=2.0, dtype=torch.float64)
    draft = tiny_draft(target, vocabulary=vocabulary).double()
    trace = said(target, temperature)
    whole = loss_and_gradient(
        draft, of_answer(trace, draft, target.logits, 4, PLACES), temperature)
    seen = likeliest(trace, draft, target.logits, most)
    few = loss_and_gradient(draft, of_likeliest(trace, draft, seen, 4, PLACES), temperature)
    assert few[0] == pytest.approx(whole[0], rel=1e-5)  # the logits of training are float32
    assert torch.allclose(few[1], whole[1], rtol=1e-3, atol=1e-5)


def test_a_token_that_is_not_among_the_likeliest_ends_the_chain():
    target = tiny_target(gain=0.3, dtype=torch.float64)
    draft = tiny_draft(target).double()
    trace = said(target, 1.0)
    seen = likeliest(trace, draft, target.logits, 2)
    rare = seen.tokens == 2
    assert rare.any() and not rare.all()
    answer = trace.ids[trace.prompt_length :]
    own = seen.ids.gather(1, seen.tokens.clamp(max=1)[:, None])[:, 0]
    assert torch.equal(own[~rare], answer[~rare])
    assert not (seen.ids[rare] == answer[rare, None]).any()
    assert torch.isneginf(seen.logits[:, 2]).all()
