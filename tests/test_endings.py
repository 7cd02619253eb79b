"""Where an answer ends."""

import pytest
import torch

from generation import Generation, Request
from support.draft_length import HEAD, PLAIN, REQUEST, FixedLength
from support.store import load, save

from .serving import BYTES, lines_of, serve
from .tiny import play, tiny_target


class Says:
    """A draft that proposes what it is told, at temperature 0.  text: the whole one, prompt too."""

    def __init__(self, *texts):
        self.texts = texts

    def new_cache(self, batch, length):
        return None

    def propose(self, features, tokens, positions, last, coins, sampling, floors, cache):
        rows = []
        for b, text in enumerate(self.texts):
            start = int(positions[b, last[b]]) + 2
            rows.append([*text, *[0] * 99][start : start + len(floors)])
        drafted = torch.tensor(rows)
        logits = torch.full((*drafted.shape, 257), float("-inf"))
        return drafted, logits.scatter(-1, drafted[..., None], 0.0), torch.zeros(drafted.shape)


PROMPT = [256, *b"abcabc"]


def greedy(target, prompt=PROMPT, new=12):
    return play(target, None, [Request(prompt, new, 0, 0.0)], FixedLength(0))[0].text[0]


def distinct(text):
    """Prompt and target of which the first five tokens of the greedy answer differ."""
    return len(set(text[len(PROMPT) : len(PROMPT) + 5])) == 5


@pytest.fixture(scope="module")
def target():
    for seed in range(200):
        made = tiny_target(seed, gain=2.0, **BYTES)
        if distinct(greedy(made)):
            return made
    raise AssertionError("no such target")


def ending(target, text, place):
    """The same target, for which the token at this place of the answer is the end token."""
    other = tiny_target(0, **BYTES | dict(eos_token_ids=(text[len(PROMPT) + place],)))
    other.load_state_dict(target.state_dict())
    return other


@pytest.mark.parametrize("place, rounds", [
    (0, [(1, 1, 1)]),  # drafted, accepted, committed: 1 of 1
    (2, [(3, 3, 3)]),
    (3, [(3, 3, 4)]),  # the target's own
    (4, [(3, 3, 4), (1, 1, 1)]),
])
def test_an_end_token_ends_the_answer(target, place, rounds):
    """Drafted and kept it is an accepted token like any other, and nothing follows it."""
    text = greedy(target)
    target, draft = ending(target, text, place), Says(text)
    generation, _ = play(target, draft, [Request(PROMPT, 12, 0, 0.0)], FixedLength(3))
    assert generation.answer() == text[len(PROMPT) :][: place + 1]
    told = [(x.drafted, x.accepted, x.committed) for x in generation.rounds[0]]
    assert told == rounds and {x.source for x in generation.rounds[0]} == {HEAD}
    trace = generation.trace()
    assert trace.ids.tolist() == text[: len(PROMPT) + place + 1]
    assert trace.committed.tolist() == [x[2] for x in rounds]
    assert (trace.draft_tokens >= 0).sum(1).tolist() == [x[0] for x in rounds]
    for row, (drafted, _, _) in zip(trace.draft_tokens, rounds):
        assert (row[:drafted] >= 0).all() and (row[drafted:] == -1).all()
    assert len(trace.answer_hidden()) == place + 1 and len(trace.features) == len(trace.ids) - 1


def test_an_end_token_that_is_rejected_ends_nothing(target):
    text = greedy(target)
    end = next(token for token in range(256) if token not in text)
    other = tiny_target(0, **BYTES | dict(eos_token_ids=(end,)))
    other.load_state_dict(target.state_dict())
    wrong = [*PROMPT, end, *text[len(PROMPT) + 1 :]]
    generation, _ = play(other, Says(wrong), [Request(PROMPT, 12, 0, 0.0)], FixedLength(3))
    assert generation.text[0] == text
    first = generation.rounds[0][0]
    assert (first.drafted, first.accepted, first.committed) == (1, 0, 1)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("source", [HEAD, REQUEST])
def test_an_answer_is_as_long_as_it_may_be(target, source, K, new):
    """The draft is right all along; the last token is the target's, and only what is in the answer
    counts as accepted."""
    text = greedy(target)
    request = Request(PROMPT, new, 0, 0.0)
    generation, _ = play(target, Says(text), [request], FixedLength(K, source), own_memory=True)
    assert generation.answer() == text[len(PROMPT) :][:new]
    assert generation.rounds[0][0].drafted == min(K, new - 1)  # the memory knows "abcabc" as well
    for x in generation.rounds[0]:
        assert x.committed == x.accepted + 1 and x.accepted <= x.drafted <= K
    if source == HEAD:
        expected = [K + 1] * (new // (K + 1)) + [new % (K + 1)] * (new % (K + 1) > 0)
        assert [x.committed for x in generation.rounds[0]] == expected


def test_a_row_that_has_ended_stands_still(target):
    """Beside one that goes on, which is what it is alone."""
    text = greedy(target)
    requests = [Request(PROMPT, 2, 0, 0.0), Request(PROMPT, 12, 0, 0.0)]
    generation, _ = play(target, Says(text, text), requests, FixedLength(3))
    assert generation.text == [text[: len(PROMPT) + 2], text]
    alone, _ = play(target, Says(text), [requests[1]], FixedLength(3))
    assert generation.rounds[1] == alone.rounds[0] and len(generation.rounds[0]) == 1
    assert generation.trace(0).ids.tolist() == generation.text[0]


def test_answers_that_end_early_are_counted_as_long_as_they_are(files, tmp_path):
    """A target with 64 end tokens, sampled: --log knows the length and who said what."""
    config, weights, record = load(files / "target.pt")
    config.eos_token_ids = tuple(range(64))
    save(tmp_path / "t.pt", config, weights, record)
    serve(files, "--target", tmp_path / "t.pt", "--no-learn", "--log", tmp_path / "l.jsonl",
          "--compare")
    lines = lines_of(tmp_path / "l.jsonl")
    assert 1 <= min(x["tokens"] for x in lines) < 12
    for x in lines:
        rounds = x["rounds"] + x["plain_rounds"]
        assert sum(x["tokens_by_source"].values()) == x["tokens"] <= 12
        assert x["accepted"] + rounds - 1 <= x["tokens"] <= x["accepted"] + rounds


def test_a_generation_of_nobodys_draft_is_plain(target):
    generation = Generation(target, None, [Request(PROMPT, 3, 0, 1.0)])
    while not generation.done:
        drafted = generation.draft_tokens(FixedLength(0).choose({}))
        generation.commit(drafted, *generation.verify(drafted))
    assert [(x.source, x.drafted, x.committed) for x in generation.rounds[0]] == 3 * [(PLAIN, 0, 1)]
