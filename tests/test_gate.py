"""The gate: how often chance alone makes it drop a draft, how soon a worse one goes, what serves.

Streams of 200 paired differences, 2000 of a kind, from fixed seeds.  Figures are what they gave;
bounds are wider by 3.5 standard errors or more of 2000 draws, so that were the seed drawn anew, a
bound would be broken with probability 3e-4."""

import random

import pytest
import torch

from model import TargetHead
from learner import Learner
from support.draft_length import FixedLength
from support.gate import EARLIEST, PAUSE, Gate

from .tiny import play, request, tiny_draft, tiny_target

STREAMS, ANSWERS = 2000, 200


def normal(draws):
    return draws.gauss(0, 1)


def heavy(draws):
    """One answer in twenty differs five times as much as the others."""
    return draws.gauss(0, 5 if draws.random() < 0.05 else 1)


def dropped_after(mean, noise, scale=1.0):
    """Of every stream: the answers until what was learned was dropped, None if it never was."""
    draws, out = random.Random(0), []
    for _ in range(STREAMS):
        gate, when = Gate(), None
        for answer in range(1, ANSWERS + 1):
            if gate.judge(scale * (mean + noise(draws))):
                when = answer
                break
        out.append(when)
    return out


@pytest.mark.parametrize("noise, most", [(normal, 0.13), (heavy, 0.1)])
def test_of_equal_drafts_one_in_ten_is_dropped_in_200_answers(noise, most):
    """10.2 % under the normal law, 7.1 % under the heavy one; a tenth of those at the eighth.
    Looking after every answer costs that: at one look a normal z is below -2.5 in 0.6 %."""
    after = [n for n in dropped_after(0.0, noise) if n]
    assert 0.02 < len(after) / STREAMS < most
    assert sum(n == EARLIEST for n in after) / STREAMS < 0.012


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_differences_does_not_matter(scale):
    assert dropped_after(0.0, normal, scale)[:200] == dropped_after(0.0, normal)[:200]


@pytest.mark.parametrize("noise, half, most", [(normal, 30, 75), (heavy, 40, 125)])
def test_a_draft_that_is_worse_is_dropped(noise, half, most):
    """Half a standard deviation behind: half of them within 26 answers, 95 % within 59, all within
    200; under the heavy law 34 and 99."""
    after = sorted(n or ANSWERS + 1 for n in dropped_after(-0.5, noise))
    assert after[STREAMS // 2] <= half and after[int(0.95 * STREAMS)] <= most
    assert sum(n > ANSWERS for n in after) <= 0.005 * STREAMS


def test_a_draft_that_is_better_is_hardly_ever_dropped():
    assert sum(n is not None for n in dropped_after(0.5, normal)) <= 0.002 * STREAMS


def test_a_draft_that_was_better_and_turns_worse_is_dropped_soon():
    """A hundred answers ahead by a standard deviation, then behind by one: the old ones fade.
    Ahead no more after 32 answers, gone after 75, both in the middle of 200 streams."""
    draws, behind, gone = random.Random(0), [], []
    for _ in range(200):
        gate, lost = Gate(), None
        for _ in range(100):
            gate.judge(1 + normal(draws))
        for n in range(1, 200):
            if gate.judge(-1 + normal(draws)):
                gone.append(n)
                break
            lost = n if lost is None and not gate.ahead else lost
        behind.append(lost or n)
    assert len(gone) == 200
    assert sorted(behind)[100] < 45 and sorted(gone)[100] < 100


def test_nobody_is_dropped_before_the_eighth_answer():
    gate = Gate()
    assert [gate.judge(-9.0) for _ in range(EARLIEST)] == [False] * (EARLIEST - 1) + [True]
    assert gate.paused == PAUSE and not gate.ahead and gate.answers == 0


def test_whichever_is_ahead_serves():
    gate = Gate()
    assert not gate.ahead  # of nothing
    for difference, ahead in (0.0, False), (1.0, True), (-0.5, True), (-0.6, False), (0.3, True):
        assert not gate.judge(difference)
        assert gate.ahead == ahead


def test_no_difference_at_all_says_nothing():
    gate = Gate()
    assert not any(gate.judge(0.0) for _ in range(1000))
    assert gate.z == 0 and not gate.ahead


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def weights(draft):
    return {name: x.clone() for name, x in draft.state_dict().items()}


def test_what_is_dropped_is_gone_and_the_learner_pauses():
    """Clearly behind: what began serves and learns on, PAUSE answers later."""
    target = tiny_target(gain=2.0)
    began = tiny_draft(target)
    generation, _ = play(target, began, [request(new=12)], FixedLength(2))
    trace = generation.trace()
    learner = Learner(began.clone(), TargetHead(target), chain=2, every=12)
    with torch.no_grad():
        for p in learner.average.parameters():
            p.add_(0.01 * torch.randn_like(p))
    while learner.gate.answers < EARLIEST - 1:
        learner.gate.judge(-1e6)  # whatever the next answer says, it is behind
    outcome = learner.update(trace)
    assert outcome.dropped and outcome.loss is None and outcome.weights is None
    for draft in (learner.draft, learner.average, learner.serves):
        assert same(weights(draft), weights(began))
    for _ in range(PAUSE):
        outcome = learner.update(trace)
        assert outcome.loss is None and outcome.weights is None
        assert not outcome.dropped
    assert same(weights(learner.draft), weights(began))
    assert learner.update(trace).loss is not None
    assert not same(weights(learner.draft), weights(began))
