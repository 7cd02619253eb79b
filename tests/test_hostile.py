"""Traffic that means harm: no answer is changed by it, and what is normal stays as fast."""

import random

import aurora
from aurora import Arm
from generation import Request
from learner import Learner, expected_length
from model import TargetHead
from support.background import Background
from support.draft_length import FixedLength

from .tiny import play, request, tiny_draft, tiny_target

EACH, NEW = 6, 16  # requests of a kind; tokens of an answer


def normal(first, count):
    return [request(new=NEW, seed=first + i, temperature=0.7) for i in range(count)]


def prompts():
    """Random tokens; one token, repeated; what the greedy target goes on repeating."""
    draws = random.Random(0)
    made = [[draws.randrange(16) for _ in range(9)] for _ in range(EACH)]
    made += [[i] * 9 for i in range(EACH)]
    return made + [9 * [1, 2, 3][: 1 + i % 3] for i in range(EACH)]


def test_hostile_traffic_changes_no_answer_and_normal_text_is_guessed_as_well():
    """Against serving without learning, greedily; and by tokens a round to expect on normal answers
    that nobody learned from, before and after: at most 3 % less."""
    target = tiny_target(gain=2.0)
    held_out = [play(target, None, [r], FixedLength(0))[0].trace() for r in normal(10**5, 8)]
    bad = [Request([16, *ids], NEW, i, 0.0 if i >= 2 * EACH else 0.7)
           for i, ids in enumerate(prompts())]
    head, draft = TargetHead(target), tiny_draft(target)
    learner = Background(Learner(draft.clone(), head, every=NEW, chain=3), process=False)
    arm, texts, lengths = Arm(draft, FixedLength(3)), [], []
    for requests in (normal(0, 6), bad, normal(50, 6)):
        for served in aurora.aurora(target, arm, learner, requests):
            texts.append(served.generation.text[0])
        arm.publish(learner.result())
        kept = [expected_length(arm.draft, trace, head, 3, "block") for trace in held_out]
        lengths.append(sum(kept) / len(kept))
    assert arm.version > EACH and learner.trouble is None  # it has learned, and served what it did
    assert lengths[1] > 0.97 * lengths[0] and lengths[2] > 0.97 * lengths[0]
    greedy = [(r, text) for r, text in zip(bad, texts[6:]) if r.temperature == 0]
    assert len(texts) == 12 + len(bad) and len(greedy) == EACH
    for r, text in greedy:
        assert text == play(target, None, [r], FixedLength(0))[0].text[0]
