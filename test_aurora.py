"""The theorems, as tests.  `pytest -q`; about five minutes on two cores.

Statistical tests draw with fixed seeds, so they do not flicker; were the seed drawn anew, each chi-square below
would raise a false alarm with probability 1e-6 (ALARM_Z).  Models are tiny and random unless the shipped weights
are what is tested.
"""

import contextlib
import copy
import gc
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)  # tiny models

import aurora
import model
import pretrain
import rl
import serve
import verify
import versions
from draft import Draft, DraftLength, FixedLength, SmallModel, slim, twin
from model import Config, Transformer, UserError, load, save
from serve import Generation, Request, generate
from verify import accept, accept_reference, inverse_cdf, probabilities

HERE = Path(__file__).parent
ALARM_Z = 4.753  # one-sided normal quantile of 1e-6


def assert_law(counts, expected_p):
    """Chi-square of observed counts (N,) against probabilities (N,); cells expected under 5 times are pooled."""
    counts, expected = torch.as_tensor(counts).double(), torch.as_tensor(expected_p).double() * sum(counts)
    assert counts[expected == 0].sum() == 0, "an impossible outcome was drawn"
    expected, order = expected.sort()
    counts = counts[order]
    rare = int((expected.cumsum(0) < 5).sum()) + 1  # the smallest cells, together at least 5
    counts = torch.cat([counts[:rare].sum()[None], counts[rare:]])
    expected = torch.cat([expected[:rare].sum()[None], expected[rare:]])
    chi2, d = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    limit = d * (1 - 2 / (9 * d) + ALARM_Z * (2 / (9 * d)) ** 0.5) ** 3  # Wilson-Hilferty
    assert chi2 < limit, f"chi2 {chi2:.1f} with {d} degrees of freedom, limit {limit:.1f}"


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tiny_config(**changes):
    sizes = dict(vocab_size=17, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=16, suppress_tokens=(16,))
    return Config(**(sizes | changes))


def tiny_target(seed=0, gain=1.0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    target = Transformer(tiny_config(**changes))
    for p in target.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)
    return target.to(dtype).eval()


def tiny_draft(target, seed=1):
    torch.manual_seed(seed)
    config = replace(slim(target.config), num_attention_heads=4, num_key_value_heads=2)  # with two groups of heads
    draft = Draft(target, config).to(target.lm_head.weight.dtype)
    for p in draft.parameters():
        if p.ndim == 2 and p.requires_grad:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return draft


def request(length=9, new=20, seed=0, temperature=1.0):
    ids = torch.randint(0, 16, (length,), generator=torch.Generator().manual_seed(100 + seed)).tolist()
    return Request([16, *ids], new, seed, temperature)


@torch.no_grad()
def target_logits(trace):
    """The target's rows of every round (R, K+1, V), before top-k and top-p."""
    return trace.head(trace.target_hidden)


@torch.no_grad()
def answer_logits(trace):
    """A row for every token of the answer."""
    return trace.head(trace.answer_hidden())


# ---- the acceptance rule: verify.py ------------------------------------------------------------------

V = 8
DRAFTS = {  # logits of adversarial drafts against a target with logits z
    "another": lambda z: torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).double(),
    "equal": lambda z: z.clone(),
    "uniform": torch.zeros_like,
    "opposed": lambda z: -2 * z.clamp(min=-5),
    "nearly one-hot": lambda z: 30 * torch.nn.functional.one_hot(z.argmin(-1), V).double(),
    "half impossible": lambda z: z.masked_fill(torch.arange(V) % 2 == 0, float("-inf")),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("K", [1, 4])
def test_every_emitted_token_follows_the_target(name, K, B=30_000):
    """Lossless: the first emitted token has law target_p_0 exactly, whatever the draft, at every temperature
    (rows of one batch at different temperatures), and the token after k kept ones has law target_p_k."""
    g = torch.Generator().manual_seed(K)
    target = 1.5 * torch.randn(K + 1, V, generator=g).double()
    target[0, 3] = float("-inf")
    draft = DRAFTS[name](target[:K])
    temperature = torch.tensor([0.5, 1.0, 1.7]).double().repeat(B // 3)
    rows = draft.expand(B, K, V), target.expand(B, K + 1, V)
    u = uniforms(B, 2 * K + 1, seed=K)
    tokens = inverse_cdf(probabilities(rows[0], temperature[:, None]), u[:, :K])
    n, following = accept(rows[1], rows[0], tokens, u[:, K:], temperature)
    emitted = torch.cat([tokens, following[:, None]], 1).scatter(1, n[:, None], following[:, None])
    for t in (0.5, 1.0, 1.7):
        for k in range(K + 1):
            reached = (temperature == t) & (n >= k)  # x_k was emitted, by either route
            if reached.sum() > 200:
                counts = torch.bincount(emitted[reached, k], minlength=V)
                assert_law(counts, (target[k] / t).softmax(-1))


def toy_tables(seed, K=3, V=4, scale=1.0):
    """Logits for every prefix shorter than K: {prefix: (V,)}, a whole tiny language."""
    g = torch.Generator().manual_seed(seed)
    return {x: scale * torch.randn(V, generator=g, dtype=torch.float64)
            for k in range(K + 1) for x in itertools.product(range(V), repeat=k)}


def test_joint_law_of_length_and_tokens(K=2, V=3, B=120_000):
    """P(n, tokens) of a round on an enumerable language, from the coins' definition; and the marginal of the
    first three tokens, continued by the target, is the target's own."""
    p, q = toy_tables(1, K, V), toy_tables(2, K, V)
    P, Q = ({x: z.softmax(-1) for x, z in table.items()} for table in (p, q))
    joint = {}
    for x in itertools.product(range(V), repeat=K):
        reach, drafted = 1.0, 1.0
        for k in range(K + 1):
            if k == K:
                mass, weight = P[x], reach * drafted
            else:
                mass = (P[x[:k]] - Q[x[:k]]).clamp(min=0)
                weight = reach * drafted * Q[x[:k]][x[k]] * (1 - min(1, P[x[:k]][x[k]] / Q[x[:k]][x[k]]))
            for v in range(V):
                key = (k, *x[:k], v)
                # a chain is enumerated once per continuation: count each rejection at its own drafted token only
                if k == K or all(c == 0 for c in x[k + 1 :]):
                    joint[key] = joint.get(key, 0.0) + float(weight * mass[v] / mass.sum()) if mass.sum() > 0 else 0.0
            if k < K:
                reach = reach * min(1, P[x[:k]][x[k]] / Q[x[:k]][x[k]])
                drafted = drafted * Q[x[:k]][x[k]]
    assert abs(sum(joint.values()) - 1) < 1e-12
    u, chains = uniforms(B, 2 * K + 1, seed=3), [()] * B
    for k in range(K):
        logits = torch.stack([q[x] for x in chains])
        token = inverse_cdf(logits.softmax(-1), u[:, k]).tolist()
        chains = [(*x, t) for x, t in zip(chains, token)]
    target = torch.stack([torch.stack([p[x[:k]] for k in range(K + 1)]) for x in chains])
    draft = torch.stack([torch.stack([q[x[:k]] for k in range(K)]) for x in chains])
    n, following = accept(target, draft, torch.tensor(chains), u[:, K:])
    seen = Counter((k, *x[:k], v) for k, x, v in zip(n.tolist(), chains, following.tolist()))
    assert set(seen) <= set(joint)
    assert_law([seen[key] for key in joint], list(joint.values()))


def test_tail_is_drawn_at_its_rate():
    """A token of probability 1e-7 owns exactly 1e-7 of the coin's range, at V = 200,000."""
    V = 200_000
    logits = torch.full((1, 1, V), float("-inf"))
    logits[0, 0, 0], logits[0, 0, V - 1] = 0.0, torch.tensor(1e-7).log()
    none = torch.empty(1, 0, dtype=torch.int64)
    for coin, token in ((1 - 0.5e-7, V - 1), (1 - 0.99e-7, V - 1), (1 - 1.01e-7, 0), (0.0, 0), (1 - 2**-53, V - 1)):
        assert accept(logits, None, none, torch.tensor([[coin]], dtype=torch.float64))[1].item() == token
    flat = torch.zeros(1, 1, V)  # and 200,000 equal ones share it evenly
    for coin in (0.25, 0.5, 0.99999, 1 - 2**-53):
        assert abs(accept(flat, None, none, torch.tensor([[coin]], dtype=torch.float64))[1].item() - int(coin * V)) <= 1


def test_greedy_is_argmax_and_rows_keep_their_own_temperature():
    target = torch.tensor([[0.0, 3, 1], [2, 0, 1], [0, 0, 5]]).repeat(3, 1, 1)
    tokens = torch.tensor([[1, 0], [1, 1], [2, 0]])
    n, following = accept(target, torch.zeros(3, 2, 3), tokens, uniforms(3, 3), 0.0)
    assert n.tolist() == [2, 1, 0] and following.tolist() == [2, 0, 1]
    mixed = accept(target, torch.zeros(3, 2, 3), tokens, uniforms(3, 3), torch.tensor([0.0, 1.0, 0.0]))
    assert mixed[0].tolist()[::2] == [2, 0] and mixed[1].tolist()[::2] == [2, 1]


def test_impossible_tokens_are_never_kept_nor_drawn():
    inf = float("inf")
    target = torch.tensor([[[-inf, 0.0, 0.0], [0.0, -inf, 0.0]]])
    draft = torch.zeros(1, 1, 3)
    for last in (0.0, 0.5, 1 - 2**-53):
        n, following = accept(target, draft, torch.tensor([[0]]), torch.tensor([[0.0, last]], dtype=torch.float64))
        assert n.item() == 0 and following.item() != 0
        n, following = accept(target, draft, torch.tensor([[1]]), torch.tensor([[0.0, last]], dtype=torch.float64))
        assert n.item() == 1 and following.item() != 1


def test_empty_residual_still_gives_a_possible_token():
    """draft_q = target_p, and a coin that rejects by rounding: forced here by a token that q does not allow."""
    inf = float("inf")
    logits = torch.tensor([[[0.0, 1.0, -inf], [0.0, 0.0, 0.0]]])
    for last in (0.0, 0.3, 1 - 2**-53):
        n, following = accept(logits, logits[:, :1], torch.tensor([[2]]), torch.tensor([[0.9, last]], dtype=torch.float64))
        assert n.item() == 0 and following.item() in (0, 1)


def test_pads_end_the_chain_and_take_target_p(B=20_000):
    target = torch.randn(1, 3, V, generator=torch.Generator().manual_seed(0)).expand(B, 3, V)
    draft = torch.full((B, 2, V), float("nan"))  # a pad's draft row is not read
    draft[:, 0] = target[:, 0]  # the first token is always kept
    tokens = torch.stack([torch.full((B,), 2), torch.full((B,), -1)], 1)
    n, following = accept(target, draft, tokens, uniforms(B, 3))
    assert (n == 1).all()
    assert_law(torch.bincount(following, minlength=V), target[0, 1].double().softmax(-1))


def test_outright_proposals_are_one_hot(B=20_000):
    target = torch.randn(1, 2, V, generator=torch.Generator().manual_seed(0)).expand(B, 2, V)
    n, following = accept(target, None, torch.full((B, 1), 5), uniforms(B, 2))
    first = torch.where(n == 1, 5, following)
    p = target[0, 0].double().softmax(-1)
    assert_law(torch.bincount(first, minlength=V), p)
    assert_law(torch.bincount(n, minlength=2), torch.stack([1 - p[5], p[5]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_raise_only_where_they_are_read(bad):
    target, draft, tokens = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
    target[0, 0, 0] = float("-inf")  # token 0 is rejected: rows 1 and 2 are never read
    broken = target.clone()
    broken[0, 1:, 2] = bad
    accept(broken, draft, tokens, uniforms(1, 3))
    for rows in (target, draft):
        broken = rows.clone()
        broken[0, 0, 2] = bad
        with pytest.raises(ValueError, match="without a distribution"):
            accept(*((broken, draft) if rows is target else (target, broken)), tokens, uniforms(1, 3))
    broken = torch.zeros(1, 1, 4)
    broken[0, 0, 1] = bad
    with pytest.raises(ValueError, match="without a distribution"):
        accept(broken, None, torch.empty(1, 0, dtype=torch.int64), uniforms(1, 1), 0.0)


def test_accept_checks_its_arguments():
    target, draft, tokens, coins = torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64), uniforms(2, 3)
    for change in (dict(target_logits=target[:, :2]), dict(draft_logits=draft[:, :1]), dict(draft_tokens=tokens + 4),
                   dict(draft_tokens=tokens - 2), dict(draft_tokens=tokens.int()), dict(coins=coins.float()),
                   dict(coins=coins + 1), dict(coins=coins[:, :2]), dict(temperature=-1.0), dict(temperature=float("nan"))):
        arguments = dict(target_logits=target, draft_logits=draft, draft_tokens=tokens, coins=coins, temperature=1.0) | change
        with pytest.raises(ValueError):
            accept(**arguments)
    n, following = accept(target[:0], draft[:0], tokens[:0], coins[:0])
    assert n.shape == following.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_decides_as_its_values_in_float64(dtype):
    target, draft = (torch.randn(50, k, 31).to(dtype) for k in (4, 3))
    tokens, coins = torch.randint(31, (50, 3)), uniforms(50, 4)
    for a, b in zip(accept(target, draft, tokens, coins), accept(target.double(), draft.double(), tokens, coins)):
        assert torch.equal(a, b)


# ---- the models: cache, rounds, replay ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, dict(qk_norm=True, attention_bias=True), dict(tie_word_embeddings=True)])
def test_cache_equals_no_cache_with_rows_at_different_positions_and_after_rollback(variant):
    target = tiny_target(dtype=torch.float64, **variant)
    ids = torch.randint(0, 16, (2, 40), generator=torch.Generator().manual_seed(0))
    whole, features = target(ids)
    cache = target.new_cache(2, 48)
    starts, done = torch.tensor([20, 11]), torch.tensor([20, 11])
    target(ids[:, :20], torch.arange(20).expand(2, -1), cache)  # row 1 read garbage after its 11 tokens
    for width in (3, 1, 5):
        at = done[:, None] + torch.arange(width)
        target(torch.randint(0, 16, (2, width)), at, cache)  # rejected tokens, to be written over
        hidden, seen = target(ids.gather(1, at), at, cache)
        for b in range(2):
            torch.testing.assert_close(hidden[b], whole[b, at[b]], atol=1e-12, rtol=0)
            torch.testing.assert_close(seen[b], features[b, at[b]], atol=1e-12, rtol=0)
        done = done + width
    assert (done - starts == 9).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_our_norm_is_torchs(dtype, tolerance, D=24):
    """Values and, but in bfloat16, gradients; also of rows so short that eps matters, and of a row of zeros."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, D, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 30.0, 1e-5, 0.1, 0.0]).view(6, 1, 1)
    ours, theirs = model.RMSNorm(D, eps=1e-6), torch.nn.RMSNorm(D, eps=1e-6)
    ours.register_buffer("floor", torch.tensor(1e-6), persistent=False)
    out = []
    for norm in (ours, theirs):
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        norm.to(dtype)
        rows = x.to(dtype).requires_grad_()
        y = norm(rows)
        assert y.dtype == dtype
        y.backward(torch.linspace(-1, 1, D, dtype=dtype).expand_as(y))
        out.append((y, rows.grad[:5], norm.weight.grad))
    assert out[0][1].isfinite().all()
    for a, b in list(zip(*out))[: 1 if dtype == torch.bfloat16 else 3]:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_matrices_that_lie_by_columns_say_the_same_and_take_what_is_published():
    """An embedding that a head is tied to lies like it; what is copied into a model leaves its layout."""
    for tied in (False, True):
        target = tiny_target(tie_word_embeddings=tied)
        draft, run = tiny_draft(target), lambda: generate(target, served, request(new=20), 3)[0]
        served, learned = twin(draft), tiny_draft(target, seed=5)
        rows, before = served.midlayer.mlp.up_proj.weight, [run()]
        served.load_state_dict(learned.state_dict())
        before.append(run())
        served.load_state_dict(draft.state_dict())
        model.by_columns(target), model.by_columns(served)
        assert served.midlayer.mlp.up_proj.weight is rows and rows.stride() == (1, rows.shape[0]) and draft.fc.weight.is_contiguous()
        after = [run()]
        served.load_state_dict(learned.state_dict())
        after.append(run())
        assert rows.stride() == (1, rows.shape[0]) and not torch.equal(*(x.draft_tokens[: 4, :1] for x in after))
        for a, b in zip(before, after):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.draft_tokens, b.draft_tokens)
            torch.testing.assert_close(a.features, b.features, rtol=1e-4, atol=1e-4)
    bits = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    model.by_columns(bits)
    assert bits.weight.is_contiguous()


def test_every_norm_has_its_eps():
    target = tiny_target(rms_norm_eps=0.25)
    for made in (target, Draft(target), SmallModel(target.config)):
        norms = [m for m in made.modules() if isinstance(m, torch.nn.RMSNorm)]
        assert len(norms) >= 4 and all(norm.floor == norm.eps == 0.25 for norm in norms)


def test_future_tokens_do_not_matter():
    target = tiny_target()
    ids = torch.randint(0, 16, (1, 30))
    other = ids.clone()
    other[0, 20:] = (other[0, 20:] + 1) % 16
    torch.testing.assert_close(target(ids)[0][:, :20], target(other)[0][:, :20])


class Oracle:
    """Knows the greedy answer and spoils some of it: rounds of every length, so every rollback."""

    def __init__(self, answer, vocabulary, spoil=0.3):
        self.answer, self.vocabulary, self.spoil = torch.tensor(answer + [0] * 20), vocabulary, spoil

    def new_cache(self, batch, length):
        return None

    def propose(self, features, ids, positions, last, coins, temperature, cache, min_confidence=None):
        at = positions[0, last[0]] + 2  # the place after the last committed token
        tokens = self.answer[at : at + coins.shape[1]][None]
        return torch.where(coins < self.spoil, (tokens + 1) % 16, tokens), torch.zeros(1, coins.shape[1], self.vocabulary), torch.zeros(1, coins.shape[1])


class RightDraft(Oracle):
    """Always right, for every row; writes into a real cache's worth of positions as a real draft would."""

    def __init__(self, answer):
        self.answer = torch.cat([answer, torch.zeros(64, dtype=torch.int64)])

    def new_cache(self, batch, length):
        self.slots = length

    def propose(self, features, ids, positions, last, coins, temperature, cache, min_confidence=None):
        K = coins.shape[1]
        assert positions.gather(1, last[:, None]).max() + K - 1 < self.slots
        at = positions.gather(1, last[:, None]) + 2 + torch.arange(K)
        return self.answer[at], torch.zeros(len(ids), K, 17), torch.zeros(len(ids), K)


@pytest.mark.parametrize("K", [1, 4])
def test_greedy_speculative_equals_greedy_plain(K):
    """Token for token in float32.  Different row counts round differently: a first difference is excused only
    where the two best logits of the plain run are within 1e-4 of each other."""
    target, lengths = tiny_target(gain=2.0), set()
    for seed in range(5):
        plain, _ = generate(target, None, request(seed=seed, temperature=0.0, new=50), 0)
        for draft in (tiny_draft(target), Oracle(plain.ids.tolist(), 17)):
            fast, _ = generate(target, draft, request(seed=seed, temperature=0.0, new=50), K)
            lengths |= set(fast.num_accepted.tolist())
            a, b = plain.ids.tolist(), fast.ids.tolist()[: len(plain.ids)]
            if a != b:
                first = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
                top = answer_logits(plain)[first - plain.prompt_length].topk(2).values
                assert top[0] - top[1] < 1e-4, f"token {first} differs and is no near-tie"
    assert lengths == set(range(K + 1)), "some round lengths never occurred: they were not tested"


@pytest.mark.parametrize("min_confidence", [None, [0.45, 0.1, 0.45]], ids=["whole chains", "some stop early"])
def test_rows_do_not_depend_on_their_neighbours(min_confidence, K=4):
    """In float64, where row counts do not change a decision: a batch of four, each row equal to itself alone."""
    target = tiny_target(gain=2.0, dtype=torch.float64)
    draft = tiny_draft(target)
    requests = [request(length=4 + 5 * i, new=31 - 5 * i, seed=i, temperature=[0.0, 0.7, 1.0, 1.3][i]) for i in range(4)]
    batch = Generation(target, draft, requests, K)
    list(serve.decode(batch, Changing(K, min_confidence=min_confidence)))
    lengths = set()
    for b, r in enumerate(requests):
        single = Generation(target, draft, [r], K)
        list(serve.decode(single, Changing(K, min_confidence=min_confidence)))
        alone = single.trace(0)
        assert batch.trace(b).ids.tolist() == alone.ids.tolist()
        lengths |= set(alone.num_accepted.tolist())
    assert len(lengths) > 1, "rounds of one length only: nothing was tested"


def test_finished_rows_stay_inside_the_cache(K=6):
    """Rows that finish early wait for the last one, even after rounds that overshot the end by K."""
    target = tiny_target()
    answer, _ = generate(target, None, request(length=6, new=60, temperature=0.0), 0)
    requests = [Request(answer.ids[:n].tolist(), new, 0, 0.0) for n, new in ((26, 1), (7, 20), (25, 2))]
    run = Generation(target, RightDraft(answer.ids), requests, K)
    while not run.done:
        run.round()
    assert all(ids == answer.ids[: len(ids)].tolist() for ids in run.committed)


class Changing:
    """A new number of drafted tokens every round, none at all now and then, several times in a row; or fewer, where confidence is low."""

    def __init__(self, *lengths, min_confidence=None):
        self.lengths, self.longest, self.min_confidence = itertools.cycle(lengths), max(lengths), min_confidence

    def begin(self):
        pass

    def choose(self):
        return next(self.lengths), self.min_confidence

    def observe(self, drafted, accepted, seconds):
        assert all(0 <= n <= K <= self.longest for K, n in zip(drafted, accepted, strict=True)) and seconds > 0


DOUBTFUL = [0.45, 0.1, 0.45, 0.45]  # 1, 2, .. tokens of less confidence are enough; a row that has stopped stays so


@pytest.mark.parametrize("K, min_confidence", [((0,), None), ((1,), None), ((3,), None), ((0, 1, 3), None), ((3, 0, 0, 2), None), ((4,), DOUBTFUL)], ids=str)
def test_law_of_generated_text_is_the_targets(K, min_confidence, B=6000):
    """Whole path: prompt -> rounds -> text.  The joint law of the first three tokens against the target's own
    probabilities, multiplied out over all 4^3 continuations; rounds of one length, of changing ones, and of those that end
    with the first token that the draft doubts."""
    target = tiny_target(gain=2.0, vocab_size=5, bos_token_id=4, suppress_tokens=(4,))
    draft = tiny_draft(target)
    temperature, prompt = 0.8, [4, 1, 2, 0, 3, 3]
    run = Generation(target, draft if any(K) else None, [Request(prompt, 3, seed, temperature) for seed in range(B)], max(K))
    list(serve.decode(run, Changing(*K, min_confidence=min_confidence)))
    if min_confidence:
        assert len({(x >= 0).sum().item() for row in run.rounds for _, x, *_ in row}) >= 3
    counts = Counter(tuple(ids[6:9]) for ids in run.committed)
    texts = list(itertools.product(range(4), repeat=3))
    hidden, _ = target(torch.tensor([prompt + list(x) for x in texts]))
    log_p = (target.logits(hidden).double() / temperature).log_softmax(-1)[:, 5:8]
    p = log_p.gather(-1, torch.tensor(texts)[..., None]).sum((1, 2)).exp()
    assert_law([counts[x] for x in texts], p.detach())


def test_replay_reproduces_the_served_draft_logits(K=4):
    """The learner's gradient is that of the policy that served: same logits to 1e-5 in float32, prompts of
    different lengths in one batch, rows 0..K-1 of every round, after rejections too."""
    target = tiny_target()
    draft = tiny_draft(target)
    requests = [request(length=3 + 8 * i, new=40, seed=i, temperature=[1.0, 0.7, 1.4][i]) for i in range(3)]
    run, logits, propose = Generation(target, draft, requests, K), [], draft.propose
    draft.propose = lambda *a: (proposed := propose(*a), logits.append(proposed[1]))[0]
    while not run.done:
        run.round()
    for b in range(3):
        trace = run.trace(b)
        served = torch.stack([x[b] for x in logits[: len(trace.starts)]])  # a row's rounds are the first ones
        replayed = rl.replay_rounds(draft, trace)
        finite = served.isfinite()
        assert (replayed.isfinite() == finite).all()
        assert (replayed - served)[finite].abs().max() < 1e-5
        log_q = (replayed / trace.temperature).log_softmax(-1).gather(-1, trace.draft_tokens[..., None]).squeeze(-1)
        torch.testing.assert_close(log_q.detach(), trace.behaviour_logprobs, atol=1e-5, rtol=0)


def test_the_draft_length_may_change_every_round(lengths=(2, 0, 0, 4, 0, 1, 3)):
    """Greedy output stays that of plain decoding, and replay still reproduces what was served: after rounds without a
    draft, the draft catches up with what the target read meanwhile.  Pads are never learned from."""
    target = tiny_target(gain=2.0)
    draft = tiny_draft(target)
    for seed, temperature in ((0, 0.0), (1, 0.9)):
        r = request(seed=seed, temperature=temperature, new=60)
        run = Generation(target, draft, [r, request(length=9, seed=7, temperature=temperature, new=45)], 4)
        list(serve.decode(run, Changing(*lengths)))
        for b in range(2):
            trace = run.trace(b)
            assert [int(n) for n in (trace.draft_tokens >= 0).sum(1)] == list(itertools.islice(itertools.cycle(lengths), len(trace.starts)))
            replayed = rl.replay_rounds(draft, trace)
            if temperature > 0:
                log_q = (replayed / temperature).log_softmax(-1).gather(-1, trace.draft_tokens.clamp(min=0)[..., None]).squeeze(-1)
                torch.testing.assert_close(log_q[trace.draft_tokens >= 0], trace.behaviour_logprobs[trace.draft_tokens >= 0], atol=1e-5, rtol=0)
            loss = rl.policy_gradient_loss(replayed, target_logits(trace)[:, :-1], trace.draft_tokens, temperature, "expected", trace.behaviour_logprobs)
            grads = torch.autograd.grad(loss, replayed)[0]
            assert (grads[trace.draft_tokens < 0] == 0).all() and grads[trace.draft_tokens >= 0].abs().max() > 0
        if temperature == 0:
            plain, _ = generate(target, None, r, 0)
            a, b = plain.ids.tolist(), run.committed[0][: len(plain.ids)]
            first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
            top = None if first is None else answer_logits(plain)[first - plain.prompt_length].topk(2).values
            assert first is None or top[0] - top[1] < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_chain_ends_with_the_token_that_makes_it_doubtful(temperature, K=5):
    """Of two rows, each by itself: by the probability that the draft gave its tokens together, at temperature 0 as if that were 1;
    as replay says it.  Coins are drawn for K tokens, however many there are: the greedy text is that of plain decoding."""
    target = tiny_target(gain=2.0)
    draft = tiny_draft(target)
    with torch.no_grad():
        draft.lm_head.weight.mul_(3)  # sure of something now and then
    requests = [request(length=6 + 3 * b, seed=b, temperature=temperature, new=60) for b in range(2)]
    run, seen = Generation(target, draft, requests, K), set()
    list(serve.decode(run, Changing(K, min_confidence=DOUBTFUL)))
    for b in range(2):
        trace = run.trace(b)
        drafted = (trace.draft_tokens >= 0).sum(1)
        log_q = (rl.replay_rounds(draft, trace) / (temperature or 1)).log_softmax(-1).gather(-1, trace.draft_tokens.clamp(min=0)[..., None])[..., 0]
        confidence = log_q.masked_fill(trace.draft_tokens < 0, 0.0).exp().cumprod(1)
        for width, sure in zip(drafted.tolist(), confidence.tolist()):
            assert all(c >= least - 1e-4 for c, least in zip(sure[: width - 1], DOUBTFUL)) and (width == K or sure[width - 1] < DOUBTFUL[width - 1] + 1e-4)
            seen.add(width)
        real = trace.draft_tokens >= 0
        torch.testing.assert_close(trace.behaviour_logprobs[real], log_q[real].detach() * (temperature > 0), atol=1e-4, rtol=0)
        assert (trace.behaviour_logprobs[~real] == 0).all() and (trace.num_accepted <= drafted).all()
        if temperature == 0:
            assert trace.ids[: len(requests[b].prompt) + 60].tolist() == generate(target, None, requests[b], 0)[0].ids.tolist()
    assert len(seen) >= 3, seen


@pytest.mark.parametrize("context", [64, 128, 512])
def test_rounds_of_every_length_are_timed_in_any_context(context):
    target = tiny_target(max_position_embeddings=context)
    seconds = serve.seconds_per_round(target, tiny_draft(target), 0.0)
    assert len(seconds) == serve.LONGEST + 1 and min(seconds) > 0


@pytest.mark.parametrize("name", ["head", "ngram"])
def test_each_length_is_given_its_own_seconds(name, monkeypatch):
    """By a clock that only rounds move: one that drafted K tokens takes 1 + K, and a plain one after drafting twice as long as one
    after a dozen plain ones."""
    from draft import NGram

    target, clock, plain, round = tiny_target(gain=2.0), [0.0], [0], Generation.round
    draft = NGram(target.config) if name == "ngram" else tiny_draft(target)
    asking(target, draft)

    def timed(self, K):
        output = round(self, K)
        plain[0] = 0 if K else plain[0] + 1
        clock[0] += 1 + self.drafted[0] + (not K and plain[0] < 12)
        return output

    monkeypatch.setattr(Generation, "round", timed)
    monkeypatch.setattr(serve.time, "perf_counter", lambda: clock[0] / 1e6)
    assert serve.seconds_per_round(target, draft, 1.0) == pytest.approx([(1 + K) / 1e6 for K in range(9)])


@pytest.mark.parametrize("cost, best", [(0.01, 7), (0.02, 6), (0.05, 4), (0.1, 3)])
def test_the_best_length_is_the_textbooks(cost, best):
    """(1 - a^(K+1)) / (1 - a) / (K c + 1) at overlap a = 0.6, where verifying costs what one token costs."""
    chooser = DraftLength([1 + cost * K for K in range(13)])
    chooser.trust([0.6] * 12, tests=1e9)
    assert chooser.choose() == (best, None)
    assert chooser.rates() == pytest.approx([(1 - 0.6 ** (K + 1)) / 0.4 / (1 + cost * K) for K in range(13)])


@pytest.mark.parametrize("speed", [1.0, 0.4, 2.5])
def test_a_worthless_draft_costs_only_its_probes_and_a_good_one_is_found_again(speed):
    """A clock instead of a machine: plain rounds take 1, K drafted tokens 1.2 + 0.1 K; or all of them as many times as much or
    as little as when they were timed."""
    seconds = [1.0] + [1.2 + 0.1 * K for K in range(1, 9)]
    chooser, draws = DraftLength(seconds), random.Random(0)

    def serve(overlap, tokens):
        clock, lengths = 0.0, Counter()
        while tokens > 0:
            K, _ = chooser.choose()
            n = next((k for k in range(K) if draws.random() > overlap), K)
            chooser.observe([K], [n], seconds[K] * speed)
            clock, tokens, lengths[K] = clock + seconds[K], tokens - n - 1, lengths[K] + 1
        return clock, lengths

    clock, lengths = serve(0.0, 3000)
    assert clock < 3000 / 0.98 and lengths[0] > 0.9 * sum(lengths.values())
    serve(0.8, 3000)
    clock, lengths = serve(0.8, 3000)
    best = max((1 - 0.8 ** (K + 1)) / 0.2 / t for K, t in enumerate(seconds))
    assert 3000 / clock > 0.97 * best, (clock, lengths)


def ends(q, K, min_confidence):
    """How many of K tokens, held to be so probable, are drafted until confidence is too low."""
    return next((k for k in range(1, K) if min_confidence and math.prod(q[:k]) < min_confidence[k - 1]), K)


def play(chooser, q, draws):
    """A round, by a clock, in which tokens are kept as often as the draft holds them probable, q -> tokens made, seconds, drafted."""
    n = next((k for k in range(8) if draws.random() >= q[k]), 8)
    K = ends(q, *chooser.choose())
    chooser.observe([K], [min(K, n)], chooser.seconds[K])
    return min(K, n) + 1, chooser.seconds[K], K


def speed(played):
    """Of rounds as `play` returns them: tokens a second."""
    made, taken, _ = zip(*played)
    return sum(made) / sum(taken)


def test_a_draft_that_stops_early_drafts_as_long_as_that_pays():
    """Tokens are kept as often as the draft held them probable, now hardly, now surely.  Ending chains by that beats every fixed
    length by 5 % at least, and comes to within 3 % of the best single threshold on the confidence; where all is doubtful there
    are only probes."""
    seconds = [1.0] + [1.1 + 0.15 * K for K in range(1, 9)]
    draws = random.Random(0)

    def rounds(count, chances):
        for _ in range(count):
            q = [draws.choice(chances) for _ in range(8)]
            yield q, next((k for k in range(8) if draws.random() >= q[k]), 8)

    def speed(played):  # [(K, n)] -> tokens per second
        return sum(min(K, n) + 1 for K, n in played) / sum(seconds[K] for K, _ in played)

    def serve(chooser, world):
        for q, n in world:
            K = ends(q, *chooser.choose())
            chooser.observe([K], [min(K, n)], seconds[K])
            yield K, n

    chooser, world = DraftLength(seconds, stops_early=True), list(rounds(3000, [0.2, 0.5, 0.95, 0.98]))
    found = speed(list(serve(chooser, world))[500:])
    assert found > 1.05 * max(speed([(K, n) for _, n in world]) for K in range(9))
    assert found > 0.97 * max(speed([(ends(q, 8, [t / 20] * 7), n) for q, n in world]) for t in range(20))
    played = list(serve(DraftLength(seconds, stops_early=True), rounds(3000, [0.02, 0.1])))
    assert speed(played) > 0.98 and sum(K > 0 for K, _ in played) < 0.1 * len(played)


def test_a_chain_goes_on_over_a_step_in_its_costs():
    """After 4 tokens the 5th is dear and the rest are cheap: all of them together may be worth it where the next one is not."""
    seconds = [1.0, 1.3, 1.6, 1.9, 2.2, 4.0, 4.01, 4.02, 4.03]
    chooser = DraftLength(seconds, stops_early=True)
    chooser.trust([0.95] * 8, 1e6)
    K, least = chooser.choose()
    rate, S = chooser.drafting(chooser.rates()), [0.95**k for k in range(9)]
    worth = [rate * (seconds[m] - seconds[4]) * S[4] / sum(S[5 : m + 1]) for m in (5, 6, 7, 8)]
    assert K == 8 and least[3] == pytest.approx(worth[3], rel=1e-4) and worth[3] < 0.5 * worth[0]


def test_a_bad_start_seldom_silences_a_good_draft():
    """150 rounds of text that is too hard for it, at the very beginning, then 500 in which it gains a third: of 32 draws, at most two
    gain less than a tenth.  Where a probe is put down as a loss, be its token accepted or not, five do."""
    seconds, gains = [1.0] + [1.5 + 0.25 * K for K in range(1, 9)], []
    for hard, seed in itertools.product([[0.1, 0.5], [0.3, 0.5], [0.2, 0.4, 0.6], [0.05, 0.2]], range(8)):
        draws, chooser = random.Random(seed), DraftLength(seconds, stops_early=True)
        played = [play(chooser, draws.choices([0.5, 0.9, 0.98] if round >= 150 else hard, k=8), draws) for round in range(650)]
        gains.append(speed(played[150:]))
    assert sum(gain < 1.1 for gain in gains) <= 2 and sum(gains) / 32 > 1.25, sorted(gains)[:6]


def test_every_answer_begins_with_probes_of_a_draft_that_was_any_good():
    """Answers of 100 rounds, the first one of text that is too hard: of 160 easy ones that follow, few are decoded plainly.  A
    worthless draft is hardly asked.  Where answers do not begin with probes, 28 are slow, and the mean is 1.31."""
    seconds, easy = [1.0] + [1.5 + 0.25 * K for K in range(1, 9)], []
    for seed in range(32):
        draws, chances = random.Random(seed), random.Random(seed)
        good, poor, worthless = DraftLength(seconds, stops_early=True), DraftLength(seconds, stops_early=True), []
        for answer in range(6):
            good.begin(), poor.begin()
            played = [play(good, draws.choices([0.5, 0.9, 0.98] if answer else [0.2, 0.4, 0.6], k=8), draws) for _ in range(100)]
            worthless.append([play(poor, [0.02] * 8, chances) for _ in range(100)])
            easy += [speed(played)] if answer else []
        assert speed(itertools.chain(*worthless[1:])) > 0.98
    assert sum(gain < 1.1 for gain in easy) <= 10 and sum(easy) / len(easy) > 1.34, (sorted(easy)[:8], sum(easy) / len(easy))


@pytest.mark.parametrize("seed", range(3))
def test_where_drafting_hardly_pays_it_is_judged_by_what_it_made(seed):
    """No fixed length gains 6 %, chains that end in doubt gain more, and they are found again after text in which none did.
    Judged by fixed lengths alone, or without forgetting, drafting stopped and hardly came back."""
    seconds, draws, made, spent = [1.0] + [1.3 + 0.21 * K for K in range(1, 9)], random.Random(seed), 0, 0.0
    chooser, fixed = DraftLength(seconds, stops_early=True), Counter()
    for round in range(5000):
        q = draws.choices([0.15, 0.35, 0.6, 0.95], [0.3, 0.2, 0.2, 0.3], k=8) if round >= 1000 else [0.1] * 8
        n = next((k for k in range(8) if draws.random() >= q[k]), 8)
        K = ends(q, *chooser.choose())
        chooser.observe([K], [min(K, n)], seconds[K])
        if round >= 1000:
            fixed.update({K: min(K, n) + 1 for K in range(9)})
            made, spent = made + min(K, n) + 1, spent + seconds[K]
    assert max(fixed[K] / 4000 / t for K, t in enumerate(seconds)) < 1.06 and made / spent > 1.06


def test_the_learners_estimate_fills_in_where_rounds_did_not_look():
    """What it says of one answer is mixed with what it said of those before, and takes over from what rounds saw long ago."""
    chooser = DraftLength([1.0] + [1.2 + 0.1 * K for K in range(1, 4)])
    for _ in range(50):
        chooser.observe([1], [1], 1.2)
    ((kept, seen), *_), tokens, seconds = chooser.recent, chooser.recent_tokens, chooser.recent_seconds
    chooser.trust([0.1, 0.6, 0.5])
    assert chooser.recent[0] == pytest.approx([0.7 * kept, 0.7 * seen]) and chooser.long_run[1] == pytest.approx([6, 10])
    assert (chooser.recent_tokens, chooser.recent_seconds) == pytest.approx((0.7 * tokens, 0.7 * seconds))
    chooser.trust([0.1, 0.2, 0.5])
    assert chooser.long_run[1] == pytest.approx([0.8 * 6 + 2, 18]) and 0.3 < chooser.survival()[0] < 1
    chooser.trust([0.1])  # what it does not estimate is forgotten all the same
    assert chooser.long_run[1] == pytest.approx([0.8 * (0.8 * 6 + 2), 0.8 * 18]) and chooser.recent[1] == [0, 0]
    for _ in range(30):
        chooser.trust([0.1, 0.6, 0.5])
    assert chooser.survival()[0] == pytest.approx((50 * 0.1 + 5 * 0.7) / (50 + 5), rel=0.02)  # what it says, and a little of the prior


def test_what_was_seen_of_a_place_is_forgotten():
    """A place that chains no longer get to is soon as in the long run, and the long run is of some hundreds of tests."""
    chooser = DraftLength([1.0] + [1.2 + 0.1 * K for K in range(1, 4)])
    chooser.trust([0.9] * 3, 1e3)
    for _ in range(60):
        chooser.observe([2], [1], 1.4)  # the second place is rejected
    S = chooser.survival()
    assert S[1] / S[0] < 0.2
    for _ in range(100):
        chooser.observe([1], [1], 1.3)
    S = chooser.survival()
    assert S[1] / S[0] > 0.8
    for _ in range(2000):
        chooser.observe([1], [0], 1.3)
    assert chooser.long_run[0][0] < 0.05 * chooser.long_run[0][1] and chooser.long_run[0][1] == pytest.approx(500, rel=0.05)


def test_a_probe_of_many_rows_loses_what_it_takes_over_the_tokens_of_a_row():
    """Two rows that drafted 3 and 0 tokens, of which one was kept: a row made 1.5 tokens in the time of three drafted ones."""
    chooser = DraftLength([1.0, 1.5, 2.0, 2.5])
    chooser.pays = False
    chooser.observe([3, 0], [1, 0], 5.0)
    assert chooser.spent == 5.0 and chooser.probed == pytest.approx(5.0 * (1 - 1.5 / 2.5))
    assert chooser.recent[0] == [1.0 * 0.99, 1.0 * 0.99]  # one row put its first place to the test


def test_the_rule_hears_of_every_answer_and_of_every_round():
    told = []

    class Rule(FixedLength):
        def begin(self):
            told.append("begins")

        def choose(self):
            told.append("chooses")
            return self.longest, None

        def observe(self, drafted, accepted, seconds):
            told.append((drafted, accepted))
            assert seconds > 0

    target = tiny_target(gain=2.0)
    draft, rule, expected = tiny_draft(target), Rule(2), []
    for seed in range(2):
        trace, _ = generate(target, draft, request(seed=seed), rule)
        expected += ["begins"] + [x for n in trace.num_accepted.tolist() for x in ("chooses", ((2,), (n,)))]
    assert told == expected


@pytest.mark.parametrize("stops_early", [False, True])
def test_after_text_that_was_too_hard_drafting_soon_comes_back(stops_early):
    """Rounds in which hardly a token is kept stop it, however good it was, and cost little; after them it is soon as fast as if
    there had been none.  A worthless draft, of which nothing else was ever seen, is not given that chance."""
    seconds, draws = [1.0] + [1.4 + 0.23 * K for K in range(1, 9)], random.Random(0)

    def rounds(chooser, count, chances):
        return [play(chooser, draws.choices(chances, k=8), draws) for _ in range(count)]

    easy, hard = [0.6, 0.9, 0.98], [0.02, 0.1]
    chooser, worthless = (DraftLength(seconds, stops_early=stops_early) for _ in range(2))
    before = speed(rounds(chooser, 1000, easy))
    assert before > 1.4 and speed(rounds(chooser, 3000, hard)) > 0.92
    rounds(chooser, 300, easy)
    assert speed(rounds(chooser, 500, easy)) > 0.95 * before
    played = rounds(worthless, 3000, hard)
    assert speed(played) > 0.97 and sum(K > 0 for _, _, K in played) < 0.05 * 3000


@pytest.mark.parametrize("stops_early", [False, True])
def test_a_long_good_time_buys_no_long_time_of_probes(stops_early):
    """However long drafting paid, of a thousand rounds of hard text, once they are known for it, a tenth may draft."""
    seconds, draws = [1.0] + [1.4 + 0.23 * K for K in range(1, 9)], random.Random(0)
    chooser, drafted = DraftLength(seconds, stops_early=stops_early), []
    for round in range(22_000):
        _, _, K = play(chooser, [0.9 if round < 20_000 else 0.02] * 8, draws)
        drafted.append(K > 0)
    assert all(drafted[19_000:20_000]) and sum(drafted[20_500:21_500]) < 100


def test_a_long_answer_is_examined_all_over():
    """More tokens than the head is given at once, and than chains start at."""
    target = tiny_target(gain=2.0)
    draft = tiny_draft(target)
    trace, _ = generate(target, None, request(new=100), 0)
    rows, _ = rl.target_rows(draft, trace, trace.answer_hidden(), trace.ids[trace.prompt_length :])
    assert len(rows) == 100 and torch.equal(rows, answer_logits(trace))
    logits, rows, tokens = rl.replay_answer(draft, trace, 2, torch.arange(0, 100, 5))
    torch.testing.assert_close(rl.acceptance_on(draft, trace, 2, 20), rl.acceptance(logits.detach(), rows, tokens))


def test_a_trace_holds_the_targets_rows_and_features(K=3):
    """The target's rows are those on the answer; features are those of the whole text; replay_answer pairs
    each start with the target's rows and tokens that follow it."""
    target = tiny_target()
    draft = tiny_draft(target)
    trace, _ = generate(target, draft, request(new=30), K)
    hidden, features = target(trace.ids[None])
    logits = target.logits(hidden)[0]
    finite = torch.arange(16)
    torch.testing.assert_close(trace.features, features[0, :-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(answer_logits(trace)[:, finite], logits[trace.prompt_length - 1 : -1, finite], atol=1e-5, rtol=0)
    drafted, rows, tokens = rl.replay_answer(draft, trace, K)
    for r in (0, 5, len(tokens) - 1):
        for k in range(K):
            at = trace.prompt_length + r + k  # the token that (r, k) is about
            if at < len(trace.ids):
                assert tokens[r, k] == trace.ids[at]
                torch.testing.assert_close(rows[r, k, finite], logits[at - 1, finite], atol=1e-5, rtol=0)
            else:
                assert tokens[r, k] == -1
    first = rl.replay_rounds(draft, trace)[0, 0]  # the same place, seen by both replays
    torch.testing.assert_close(drafted[0, 0], first, atol=1e-5, rtol=0)


def test_shallow_target_is_refused():
    with pytest.raises(UserError, match="6 layers"):
        Draft(tiny_target(num_hidden_layers=6))


# ---- the learner: rl.py ---------------------------------------------------------------------------------


def enumerated(estimate, drawn_from, theta, target, K=3, V=4):
    """sum over all chains of P(chain) * grad(loss of that chain alone), and the exact gradient of L."""
    chains = list(itertools.product(range(V), repeat=K))
    stack = lambda table, x: torch.stack([table[x[:k]] for k in range(K)])
    gradient = {x: torch.zeros(V, dtype=torch.float64) for x in theta}
    exact = 0.0
    for x in chains:
        q, p = stack(theta, x), stack(target, x)
        behaviour = torch.stack([drawn_from[x[:k]].softmax(-1)[x[k]] for k in range(K)]).detach()
        loss = estimate(q[None], p[None], torch.tensor([x]), behaviour.log()[None])
        for key, g in zip(theta, torch.autograd.grad(loss, list(theta.values()), allow_unused=True, retain_graph=True)):
            if g is not None:
                gradient[key] += -behaviour.prod() * g
        least = torch.minimum(q.softmax(-1), p.softmax(-1))[torch.arange(K), list(x)].cumprod(0)
        # a prefix of length j is enumerated V^(K-j) times
        exact = exact + (least / V ** torch.arange(K - 1, -1, -1).double()).sum()
    exact = torch.autograd.grad(exact, list(theta.values()), allow_unused=True)
    flat = lambda gs: torch.cat([g if g is not None else torch.zeros(V, dtype=torch.float64) for g in gs])
    return flat(gradient.values()), flat(exact)


def textbook(q, p, tokens, _):
    """reward = accepted tokens from here on, times grad log q, for every outcome of the coins.  The counter-example."""
    log_q, log_p = (z.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) for z in (q, p))
    loss, reach = 0.0, 1.0
    for n, kept in enumerate([*(log_p - log_q).exp().clamp(max=1)[0].tolist(), 0.0]):  # n tokens kept, the next one not
        reward = (n - torch.arange(log_q.shape[1])).clamp(min=0)
        loss, reach = loss - reach * (1 - kept) * (reward * log_q).sum(), reach * kept
    return loss


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_unbiased_by_enumeration(seed):
    """V = 4, K = 3, every chain weighed by its probability, loss taken at R = 1: equal to autograd of the
    enumerated objective to 1e-9, on-policy, off-policy and from the target's tokens; textbook REINFORCE is not, and its
    bias is the same whoever drew the tokens."""
    theta = {x: z.requires_grad_() for x, z in toy_tables(10 + seed).items() if len(x) < 3}
    target = {x: theta[x].detach() + 0.6 * z for x, z in toy_tables(30 + seed).items() if len(x) < 3}  # a good draft's
    old = toy_tables(40 + seed, scale=0.5)
    biased, exact = enumerated(textbook, theta, theta, target)
    cosine = torch.nn.functional.cosine_similarity(biased, exact, dim=0)
    assert cosine < 0.8 and (biased - exact).abs().max() > 1e-2, f"the textbook should be biased, cosine {cosine:.3f}"
    sides = (theta, lambda b: None), (theta, lambda b: b), (old, lambda b: b), (target, lambda b: "target")
    for name, right in (("reinforce_textbook", biased), ("reinforce", exact), ("expected", exact)):
        for drawn, behaviour in sides:
            got, _ = enumerated(lambda q, p, x, b: rl.policy_gradient_loss(q, p, x, 1.0, name, behaviour(b)), drawn, theta, target)
            torch.testing.assert_close(got, right, atol=1e-9, rtol=0, msg=f"{name} is not what it should be")
        got, _ = enumerated(lambda q, p, x, b: rl.target_side_loss(q, p, x, 1.0, name), target, theta, target)
        torch.testing.assert_close(got, right, atol=1e-9, rtol=0)


def test_the_baseline_cuts_variance(monkeypatch):
    """On near languages, with the tokens that the draft drew: without it, each unbiased rung is noisier on every one."""
    noise = lambda: torch.tensor([[rl.measured(name, seed)[2] for seed in range(5)] for name in ("reinforce", "expected")])
    with_baseline, chain = noise(), rl._chain
    monkeypatch.setattr(rl, "_chain", lambda *a: (*chain(*a)[:3], torch.zeros(1, 3)))  # `below` = 0: no baseline
    assert (with_baseline < noise()).all()


@pytest.mark.parametrize("behaviour", [None, "target"])
@pytest.mark.parametrize("far", [False, True])
def test_the_ladder_on_enumerable_languages(far, behaviour):
    """All sums are exact.  Theorems: the unbiased rungs have cosine and length 1, the textbook has not, and the mean of the
    textbook and of `log` does not depend on who drew the tokens.  An observation that holds on each of these languages:
    the closed form cuts the noise of `reinforce`."""
    for seed in range(5):
        cosine, length, noise = (dict(zip(rl.ESTIMATORS, column)) for column in
                                 zip(*(rl.measured(name, seed, far, behaviour).tolist() for name in rl.ESTIMATORS)))
        for name in ("reinforce", "expected"):
            assert abs(cosine[name] - 1) < 1e-9 and abs(length[name] - 1) < 1e-9
        assert cosine["reinforce_textbook"] < 0.999 and noise["expected"] < noise["reinforce"]
        assert all(abs(length[name] - 1) > 1e-3 for name in ("log", "kl"))  # other utilities
        for name in ("reinforce_textbook", "log"):
            mean = torch.tensor([cosine[name], length[name]], dtype=torch.float64)
            torch.testing.assert_close(mean, rl.measured(name, seed, far)[:2], atol=1e-9, rtol=0)


def test_noise_is_the_variance_over_the_squared_mean(V=5):
    """Chains of one token: the closed forms leave nothing to chance, and `reinforce` on the target's tokens is worked out by
    hand: grad min(1, q/p)(x) = 1[q < p] (q/p) (e_x - q)."""
    for name in ("expected", "log", "kl"):
        assert abs(rl.measured(name, 3, behaviour="target", V=V, K=1)[2]) < 1e-12
    draft, other = torch.randn(2, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q, p = draft.softmax(-1), (draft + 0.6 * other).softmax(-1)
    each = torch.where(q < p, q / p, 0.0)[:, None] * (torch.eye(V) - q)
    mean = p @ each
    noise = p @ ((each - mean) ** 2).sum(-1) / (mean**2).sum()
    torch.testing.assert_close(rl.measured("reinforce", 3, behaviour="target", V=V, K=1)[2], noise)


def test_kl_is_forward_kl_whoever_drew_the_tokens():
    """sum_v p log(p / q) at every place that is no pad, neither weighed nor reversed; ids that the draft cannot say are left out."""
    g = torch.Generator().manual_seed(4)
    draft, target = (torch.randn(6, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(5, (6, 3), generator=g)
    p, q = (target / 0.7).softmax(-1), (draft / 0.7).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(rl.forward_kl_loss(draft, target, 0.7), divergence.sum(1).mean())
    for pads in (0, 4):
        tokens[:pads, 2] = -1
        for behaviour in (None, "target", torch.full((6, 3), -2.0)):
            loss = rl.policy_gradient_loss(draft, target, tokens, 0.7, "kl", behaviour)
            torch.testing.assert_close(loss, (divergence * (tokens >= 0)).sum(1).mean())
    draft[..., 4] = float("-inf")
    q = (draft / 0.7).softmax(-1)
    torch.testing.assert_close(rl.forward_kl_loss(draft, target, 0.7), (p * (p / q).log())[..., :4].sum((1, 2)).mean())


def test_the_ladder_prints_a_row_and_a_sentence_a_rung():
    printed = subprocess.run([sys.executable, str(HERE / "rl.py")], capture_output=True, text=True, check=True, timeout=120).stdout
    rows = [line.split() for line in printed.splitlines() if "±" in line]
    assert [row[0] for row in rows] == list(rl.ESTIMATORS) and all(len(row) == 9 for row in rows)
    assert [row[1:3] == ["1.00±0.00"] * 2 for row in rows] == [False, True, True, False, False]
    assert all(sentence in printed for sentence in rl.ESTIMATORS.values())


@pytest.mark.parametrize("estimator", rl.ESTIMATORS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_pads_temperature_and_mean_over_rounds(estimator, temperature):
    """A padded position takes no part; the loss is a mean over rounds; temperature scales both sides (0: one-hot)."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(5, 3, 6, generator=g, dtype=torch.float64).requires_grad_()
    p, tokens = torch.randn(5, 3, 6, generator=g, dtype=torch.float64), torch.randint(6, (5, 3), generator=g)
    loss = lambda q, p, x, t=temperature: rl.policy_gradient_loss(q, p, x, t, estimator)
    each = torch.stack([loss(q[r : r + 1], p[r : r + 1], tokens[r : r + 1]) for r in range(5)])
    torch.testing.assert_close(loss(q, p, tokens), each.mean())
    padded = torch.cat([tokens[:, :2], torch.full((5, 1), -1)], 1)
    grad = torch.autograd.grad(loss(q, p, padded), q)[0]
    assert grad[:, 2].abs().max() == 0 and grad[:, 0].abs().max() > 0
    if temperature == 0.7:
        torch.testing.assert_close(loss(q, p, tokens), loss(q / 0.7, p / 0.7, tokens, 1.0))


def test_suppressed_ids_give_finite_gradients():
    for temperature in (0.0, 0.8):
        p, tokens = torch.randn(4, 3, 6), torch.randint(5, (4, 3))
        p[..., 5] = float("-inf")
        tokens[0] = p[0].argmax(-1)  # greedy, one round at least is on the target's path
        raw = torch.randn(4, 3, 6, requires_grad=True)
        q = raw.index_fill(-1, torch.tensor([5]), float("-inf"))
        losses = [rl.policy_gradient_loss(q, p, tokens, temperature, e) for e in rl.ESTIMATORS]
        losses += [rl.target_side_loss(q, p, p.argmax(-1), temperature, e) for e in rl.ESTIMATORS]
        for loss in losses:
            grad = torch.autograd.grad(loss, raw, retain_graph=True)[0]
            assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("estimator", rl.ESTIMATORS)
def test_the_learner_learns_from_the_right_rows(estimator, K=3):
    """Learner.loss, each half alone, against losses computed from the target and the draft anew, without cache,
    trace rows or replay of many rounds: every round's own text, rejected tokens included, goes through both models."""
    target = tiny_target(dtype=torch.float64)
    draft = tiny_draft(target)
    trace, _ = generate(target, draft, request(new=25), K)
    assert (trace.num_accepted < K).any()
    with torch.no_grad():  # a step later: the draft that learns is no longer the one that served
        draft.lm_head.weight.add_(0.1 * torch.randn(draft.lm_head.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))

    def rows(prefix, chain):
        """draft and target logits (K, V) for a round after `prefix` that drafts `chain`."""
        text = torch.tensor(prefix + chain)
        hidden, features = target(text[None])
        start = torch.tensor([[len(prefix) - 2]])
        q = draft.replay(features[:, : len(prefix) - 1], text[None, 1 : len(prefix)], start, torch.tensor([[chain[:-1]]]))
        return q[0, 0], target.logits(hidden)[0, len(prefix) - 1 : -1].detach()

    ids = trace.ids.tolist()
    pairs = [rows(ids[: s + 2], x) for s, x in zip(trace.starts.tolist(), trace.draft_tokens.tolist())]
    q, p = (torch.stack(side) for side in zip(*pairs))
    expected = rl.policy_gradient_loss(q, p, trace.draft_tokens, 1.0, estimator, trace.behaviour_logprobs)
    torch.testing.assert_close(rl.Learner(draft, estimator, 1e-3, 0.0).loss(trace), expected, atol=1e-6, rtol=1e-6)

    places = [n for n in range(trace.prompt_length, len(ids) - K + 1)]
    q, p = (torch.stack(side) for side in zip(*(rows(ids[:n], ids[n : n + K]) for n in places)))
    drafted, target_rows, tokens = rl.replay_answer(draft, trace, K)
    whole_loss = rl.target_side_loss(drafted, target_rows, tokens, 1.0, estimator)
    torch.testing.assert_close(rl.Learner(draft, estimator, 1e-3, 1.0, chain=K).loss(trace), whole_loss)
    whole = (tokens >= 0).all(-1)
    assert whole.sum() == len(places) and tokens[whole].tolist() == [ids[n : n + K] for n in places]
    expected = rl.target_side_loss(q, p, tokens[whole], 1.0, estimator)
    got = rl.target_side_loss(drafted[whole], target_rows[whole], tokens[whole], 1.0, estimator)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_plain_rounds_teach_by_what_followed_them():
    """Rounds that drafted and rounds that did not, in one trace: each counts once, the former by the draft's tokens,
    the latter by the target's."""
    target = tiny_target(dtype=torch.float64)
    draft = tiny_draft(target)
    run = Generation(target, draft, [request(new=30)], 3)
    list(serve.decode(run, Changing(2, 0, 3, 0, 0, 1)))
    trace, learner = run.trace(0), rl.Learner(draft, "log", 1e-3, 0.0, chain=4)
    logits, rows, tokens = rl.replay_answer(draft, trace, learner.chain)
    total = 0.0
    for r, start in enumerate(trace.starts.tolist()):
        if trace.draft_tokens[r, 0] < 0:
            at = start + 2 - trace.prompt_length
            total += rl.target_side_loss(logits[at, None], rows[at, None], tokens[at, None], estimator="log")
        else:
            own = slice(r, r + 1)
            total += rl.policy_gradient_loss(rl.replay_rounds(draft, trace)[own], target_logits(trace)[own, :-1], trace.draft_tokens[own],
                                             1.0, "log", trace.behaviour_logprobs[own])
    torch.testing.assert_close(learner.loss(trace), total / len(trace.starts), atol=1e-6, rtol=1e-6)


def test_what_the_target_said_is_never_rounded_to_bfloat16():
    """Where the learner multiplies in bfloat16 the target's rows are still those of float32: a rounded row can have another
    argmax than the one that served.  And a token that its row gives no probability, as after any such rounding, ends its
    chain instead of dividing by zero."""
    target = tiny_target(gain=2.0)
    trace, _ = generate(target, tiny_draft(target), request(new=40), 3)
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = rl.target_rows(tiny_draft(target), trace, trace.target_hidden, trace.draft_tokens)
    finite = rows.isfinite()
    torch.testing.assert_close(rows[finite], target_logits(trace)[finite], atol=1e-6, rtol=1e-6)
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    said = logits.detach().argmin(-1)
    loss = rl.target_side_loss(logits, logits.detach(), said, temperature=0, estimator="log")
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_places_that_no_round_reached_have_no_acceptance():
    """Chains of 2, 1 and 0 tokens, padded to 4: an estimate for two places, which is the overlap where the chain got to."""
    g = torch.Generator().manual_seed(5)
    draft, target = (torch.randn(3, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    tokens = torch.tensor([[1, 2, -1, -1], [3, -1, -1, -1], [-1, -1, -1, -1]])
    least = torch.minimum(draft.softmax(-1), target.softmax(-1))
    expected = [least[:2, 0].sum(-1).mean(), least[0, 1].sum()]
    torch.testing.assert_close(rl.acceptance(draft, target, tokens), torch.stack(expected))


def test_logs_of_several_estimators_and_seeds_become_one_table(tmp_path, capsys):
    for name, seed, last in (("log", 0, 2.5), ("log", 1, 3.5), ("kl", 0, 2.0), ("kl", 1, 2.0)):
        lines = [{"arm": "plain"}] + [{"arm": "online", "held_out": {"a": 1.0 + (last - 1.0) * i / 10, "b": last}} for i in range(1, 11)]
        (tmp_path / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rl.in_earnest([str(path) for path in tmp_path.iterdir()], f"{tmp_path}/p.png" if importlib.util.find_spec("matplotlib") else None)
    head, first, second = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["after", "requests", "2", "4", "6", "8", "10", "seeds"]
    assert first == ["log", "2.20±0.42", "2.40±0.49", "2.60±0.57", "2.80±0.64", "3.00±0.71", "2"]
    assert second[0] == "kl" and second[5] == "2.00±0.00"
    (tmp_path / "x-0.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no examination"):
        rl.in_earnest([tmp_path / "x-0.jsonl"], None)


def test_the_average_of_a_tied_weight_serves_under_both_its_names():
    target = tiny_target()
    small = SmallModel(replace(target.config, tie_word_embeddings=True, num_hidden_layers=2))
    asking(target, small)
    learner = rl.Learner(small, "log", 1e-2, 1.0, horizon=4)
    for seed in range(3):
        learner.update(generate(target, small, request(seed=seed), 3)[0])
    served = SmallModel(small.config)
    served.load_state_dict(learner.publish())
    name = "model.embed_tokens.weight"
    assert torch.equal(served.lm_head.weight, learner.average[name]) and not torch.equal(served.lm_head.weight, small.lm_head.weight)


def test_a_resumed_run_learns_at_its_own_rate():
    target = tiny_target()
    learner = rl.Learner(tiny_draft(target), "log", 1e-2, 1.0)
    learner.update(generate(target, learner.draft, request(), 3)[0])
    resumed = rl.Learner(tiny_draft(target), "log", 1e-4, 1.0)
    resumed.restore(learner.state())
    fresh = rl.Learner(tiny_draft(target), "log", 1e-4, 1.0)
    assert [o.param_groups[0]["lr"] for o in resumed.optimizers] == [o.param_groups[0]["lr"] for o in fresh.optimizers]
    assert all(o.state for o in resumed.optimizers)


def test_greedy_chains_go_on_while_the_argmax_is_the_same():
    """Three places, three chains.  A place counts if a chain gets there; one whose drafted token was not the target's own does
    not go on, whatever the draft says now."""
    own = torch.tensor([[1, 2, 3], [2, 2, 0], [3, 0, 0]])
    said = torch.tensor([[1, 2, 3], [2, 2, 1], [0, 0, 0]])
    draft, target = (torch.nn.functional.one_hot(x, 5).float() for x in (said, own))
    torch.testing.assert_close(rl.acceptance(draft, target, own, 0.0), torch.tensor([2 / 3, 1.0, 0.5]))
    drafted = torch.tensor([[1, 4, 3], [2, 2, -1], [0, 0, 0]])
    torch.testing.assert_close(rl.acceptance(draft, target, drafted, 0.0), torch.tensor([2 / 3, 1.0, 0.0]))


@pytest.mark.parametrize("scratch", [True, False])
def test_the_average_of_the_weights_is_what_serves(scratch, horizon=4):
    """After every step: of a trained draft, a share 1/horizon of the way towards the new weights; of a random one 3/(n+2) of
    it while that is more, so the first steps count at once.  A resumed learner goes on from both sets of weights."""
    target = tiny_target()
    draft = tiny_draft(target)
    learner = rl.Learner(draft, "log", 1e-2, 1.0, horizon=horizon, scratch=scratch)
    names = [n for n, p in draft.named_parameters() if p.requires_grad]
    trace, _ = generate(target, draft, request(new=30), 3)
    expected = {n: draft.get_parameter(n).detach().clone() for n in names}
    for n in range(1, 25):
        if n == 20:  # what serves is the published draft; another process goes on from it and from the state
            published = {name: value.clone() for name, value in learner.publish().items()}
            state, draft = copy.deepcopy(learner.state()), tiny_draft(target)
            draft.load_state_dict(published)
            learner = rl.Learner(draft, "log", 1e-2, 1.0, horizon=horizon)
            learner.restore(state)
        learner.update(trace)
        share = max(1 / horizon, 3 / (n + 2)) if scratch else 1 / horizon
        for name in names:
            expected[name] += share * (draft.get_parameter(name).detach() - expected[name])
    published = learner.publish()
    assert set(published) == set(draft.state_dict()) and not torch.equal(published["fc.weight"], draft.fc.weight)
    for name, value in draft.state_dict().items():
        torch.testing.assert_close(published[name], expected.get(name, value), atol=1e-6, rtol=1e-5)


def test_memory_is_the_last_traces_and_a_fair_sample_of_the_rest(recent=3, size=4, served=24, trials=600):
    """How often each older trace is in the sample, over 600 learners: chi-square, 20 degrees of freedom; a fair one exceeds
    56.0 once in 30000 times, and the counts of a sample without replacement vary less than that assumes."""
    target = tiny_target()
    draft, kept = tiny_draft(target), torch.zeros(served)
    for seed in range(trials):
        learner = rl.Learner(draft, "log", 1e-2, 1.0, recent=recent, reservoir=size, seed=seed)
        for i in range(served):
            learner.remember(i)
        assert list(learner.recent) == [21, 22, 23] and len(set(learner.reservoir)) == size and max(learner.reservoir) < 21
        kept[learner.reservoir] += 1
    expected = trials * size / (served - recent)
    assert ((kept[: served - recent] - expected) ** 2 / expected).sum() < 56.0, kept
    learner = rl.Learner(draft, "log", 1e-2, 1.0, recent=recent, reservoir=0)
    for i in range(served):
        learner.remember(i)
    assert learner.reservoir == [] and list(learner.recent) == [21, 22, 23]


def test_places_are_drawn_without_looking():
    """With one place an update, every place of the answer comes up, each with its own loss."""
    target = tiny_target()
    draft = tiny_draft(target)
    trace, _ = generate(target, draft, request(new=12), 3)
    answer = range(len(trace.ids) - trace.prompt_length)  # 12 to 15, as the last round ends
    each = [rl.target_side_loss(*rl.replay_answer(draft, trace, 3, torch.tensor([i])), estimator="log").item() for i in answer]
    learner = rl.Learner(draft, "log", 1e-2, 1.0, chain=3, places=1)
    drawn = [learner.loss(trace).item() for _ in range(200)]  # one of 15 is never drawn in less than 1 of 50000 runs
    nearest = [min(answer, key=lambda i: abs(each[i] - x)) for x in drawn]
    assert set(nearest) == set(answer) and max(abs(each[i] - x) for i, x in zip(nearest, drawn)) < 1e-5


def test_divergence_is_reported_and_the_draft_kept():
    target = tiny_target()
    learner = rl.Learner(tiny_draft(target), "log", 1e-3, 0.5, batch=2)
    trace, _ = generate(target, learner.draft, request(), 3)
    trace.features[0] = float("nan")
    whole, _ = generate(target, learner.draft, request(seed=1), 3)
    learner.update(whole), learner.update(replace(whole))
    before = {name: value.clone() for name, value in learner.publish().items()}
    with pytest.raises(UserError, match="diverged"):
        learner.update(trace)
    for weights in (learner.publish(), learner.draft.state_dict()):  # back to what serves
        assert all(torch.equal(value, weights[name]) for name, value in before.items())
    assert len(learner.recent) == 1 and learner.recent[0] is not trace and learner.update(whole)["loss"] > 0  # of two in memory one was learned from


@pytest.mark.parametrize("every", "06")
def test_weights_that_left_the_numbers_are_never_published(files, tmp_path, every):
    with pytest.raises(UserError, match="diverged.*weights"):
        run(files, "--lr", "1e38", "--learn-every", every, "--save", f"{tmp_path}/kept")
    run(files, "--draft", f"{tmp_path}/kept", "--no-learn")  # what served last was kept, and serves


def test_log_is_the_gradient_of_its_utility():
    """Sum_i S_{<i} grad(alpha_i) / alpha_i, S held fixed, for tokens that another draft drew."""
    g = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(6, 3, 5, generator=g, dtype=torch.float64)
    draft, target, old = draw().requires_grad_(), draw(), draw().log_softmax(-1)
    tokens = torch.distributions.Categorical(logits=old).sample()
    behaviour = old.gather(-1, tokens[..., None]).squeeze(-1)
    loss = rl.policy_gradient_loss(draft, target, tokens, 1.0, "log", behaviour)
    least = torch.minimum(draft.softmax(-1), target.softmax(-1))
    a = least.gather(-1, tokens[..., None]).squeeze(-1).detach() / behaviour.exp()
    before = torch.stack([torch.ones(6, dtype=torch.float64), a[:, 0], a[:, 0] * a[:, 1]], 1)
    alpha = least.sum(-1)
    expected = -(before / alpha.detach() * alpha).sum(1).mean()
    ours, theirs = (torch.autograd.grad(x, draft)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown estimator"):
        rl.policy_gradient_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), estimator="x")


@pytest.mark.parametrize("estimator, temperature, target_side, growth",
                         [("log", 0.7, 0.5, 1.5), ("log", 0.7, 0.0, 1.5), ("log", 0.0, 0.5, 1.15), ("expected", 0.7, 0.5, 1.1)])
def test_serving_teaches_the_draft(estimator, temperature, target_side, growth):
    """20 requests, then 8 held-out answers: the expected accepted tokens have grown.  (`expected` starts slowly from
    nothing: where draft and target hardly overlap, the gradient of the overlap vanishes.)"""
    target = tiny_target(gain=2.0)
    with torch.no_grad():  # layers that say little: the next token hangs on the last one, which 20 requests can teach
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    held = [generate(target, None, request(seed=1000 + i, new=48, temperature=temperature), 0)[0] for i in range(8)]
    draft = Draft(target)
    learner = rl.Learner(draft, estimator, 0.05, target_side)

    def accepted():  # expected accepted tokens a round, over every place of the held-out answers
        with torch.no_grad():
            return sum(-rl.target_side_loss(*rl.replay_answer(draft, x, 3), temperature).item() for x in held) / len(held)

    before = accepted()
    for seed in range(20):
        trace, _ = generate(target, draft, request(seed=seed, new=48, temperature=temperature), 3)
        learner.update(trace)
    assert accepted() > growth * before, (before, accepted())


# ---- the gate: versions.py -----------------------------------------------------------------------------------


def verdicts(gate, gains, kept=0, tested=0):
    """Of an answer after the other, each with that many tokens kept and tested."""
    return ["rests" if gate.rests(kept, tested) else gate.judge(d) for d in gains]


def test_the_gate_hardly_takes_noise_for_progress_and_knows_progress(trials=2000):
    """Differences of a drift and standard deviation 1, until the first verdict.  Of comparisons of equals, looked at after
    every answer from the 8th on, one in twenty-five ends in "better" (5 % is 2.5 standard errors of 2000 more, so that one
    seed in two hundred would go over it; this one is fixed)."""
    g = torch.Generator().manual_seed(0)
    share, answers = {}, {}
    for drift in (0.0, 0.5, -0.5):
        first = []
        for _ in range(trials):
            gate, said = versions.Gate(), "learns"
            for n in itertools.count(1):
                said = gate.judge(drift + torch.randn((), generator=g).item())
                if said != "learns":
                    break
            first.append((said == "better", n))
        share[drift], answers[drift] = (sum(x) / trials for x in zip(*first))
    assert share[0.0] < 0.05 and share[0.5] > 0.95 and share[-0.5] < 0.01, share
    assert answers[0.0] < 40 and answers[0.5] < 35 and answers[-0.5] < 15, answers


def test_the_gate_rests_longer_each_time_and_from_the_start_after_progress():
    gate, bad = versions.Gate(), [-1.0] * 8  # eight differences of one sign are 2.8 standard errors
    for rest in (64, 128, 256, 512, 512):
        assert verdicts(gate, bad) == ["learns"] * 7 + ["nothing gained"]
        assert verdicts(gate, [1.0] * rest) == ["rests"] * rest
    assert verdicts(gate, [1.0] * 8)[-1] == "better" and verdicts(gate, bad)[-1] == "nothing gained" and gate.resting == 64


def test_progress_is_waited_for_as_long_as_it_shows_the_better_the_longer_it_lasts():
    """Of differences 1 + 6 and 1 - 6 in turn z is about sqrt(n / 37), and log2(n / 32) is past it from 100 on.  That is -2
    at 8 and 0 at 32, where no difference at all, or one that comes and goes, ends."""
    assert verdicts(versions.Gate(), [7.0, -5.0] * 51) == ["learns"] * 101 + ["nothing gained"]
    assert verdicts(versions.Gate(), [1.0, -1.0] * 17) == ["learns"] * 33 + ["nothing gained"]
    assert verdicts(versions.Gate(), [0.0] * 33) == ["learns"] * 32 + ["nothing gained"]
    for behind, said in ((0.9, "learns"), (1.1, "nothing gained")):  # z is -1.9 and -2.1 of eight
        assert verdicts(versions.Gate(), [-behind - 1.0, -behind + 1.0] * 4) == ["learns"] * 7 + [said]


def test_what_once_served_is_gone_back_to_when_it_leads_again(trials=100):
    """Differences of standard deviation 1: a fallback that is half of it behind for 200 answers, and then as much ahead.  What
    was before does not weigh: after 40 answers four in five have changed places, after 24 on average; hardly one did for nothing."""
    g = torch.Generator().manual_seed(0)
    wrong, late, waited = 0, 0, []
    for _ in range(trials):
        gate = versions.Gate()
        before, after = ([gate.judge(0.0, drift + x) for x in torch.randn(n, generator=g).tolist()] for drift, n in ((-0.5, 200), (0.5, 60)))
        wrong += "falls back" in before
        late += "falls back" not in after[:40]
        waited += [after.index("falls back")] if "falls back" in after else []
    assert wrong < 0.1 * trials and late < 0.3 * trials and sum(waited) / len(waited) < 30, (wrong, late, sum(waited) / len(waited))


def test_there_is_no_rest_while_the_fallback_is_likely_to_lead():
    gate = versions.Gate()
    assert [gate.judge(-1.0, lead) for lead in [5.0, 5.0] + [0.0] * 20 + [-6.0]] == ["learns"] * 22 + ["nothing gained"]
    gate = versions.Gate()
    assert [gate.judge(-1.0, 9.0 * (n == 0)) for n in range(8)] == ["learns"] * 7 + ["nothing gained"]  # one answer: z is 1
    gate = versions.Gate()
    gate.rest, gate.kept = 256, [(5, 9)]
    assert [gate.judge(-1.0, 1.0) for _ in range(8)] == ["learns"] * 7 + ["falls back"]
    assert gate.rest == 64 and not (gate.resting or gate.leads or gate.ahead or gate.kept)
    gate = versions.Gate()
    assert [gate.judge(1.0, 0.5) for _ in range(8)] == ["learns"] * 7 + ["falls back"]  # though what is learned is better too
    gate = versions.Gate()
    said = [gate.judge(1.0, lead) for lead in [-1.0] * 4 + [1.0] * 8]
    assert said == ["learns"] * 7 + ["better"] + ["learns"] * 3 + ["falls back"]  # "better" is no reason to forget what leads


def answers(gate, g, share, count, spread=0.05, tested=100):
    kept = (tested * (share + spread * torch.randn(count, generator=g))).round().clamp(0, tested).int().tolist()
    return ["rests" if gate.rests(k, tested) else gate.judge(-1.0) for k in kept]


def test_a_shift_of_traffic_ends_a_rest():
    """Kept shares around 0.75, then 0.6 or 0.9: within eight answers the learner is awake, its first rest before it, even if
    the shift comes with the rest.  What was served when it woke is forgotten; answers without a drafted token tell nothing."""
    g = torch.Generator().manual_seed(1)
    for level in (0.6, 0.9):
        gate = versions.Gate()
        assert answers(gate, g, 0.75, 8 + 64 + 8)[7::72] == ["nothing gained"] * 2 and gate.rest == 256
        assert answers(gate, g, 0.75, 30) == verdicts(gate, [-1.0] * 30) == ["rests"] * 30
        said = answers(gate, g, level, 8)
        assert said[0] == "rests" and said[-1] == "learns" and gate.rest == 64
        assert answers(gate, g, level, 8 + 64 - said.count("learns"))[-64:] == ["rests"] * 64

        gate = versions.Gate()
        for kept in (75 + 5 * torch.randn(40, generator=g)).int().tolist():
            gate.rests(kept, 100)
        assert verdicts(gate, [-1.0] * 8)[-1] == "nothing gained" and "learns" in answers(gate, g, level, 8)


@pytest.mark.parametrize("share, spread, tested", [(0.75, 0.05, 100), (0.75, 0.0, 100), (0.02, 0.0, 5), (0.01, 0.0, 20), (0.0, 0.0, 3)])
def test_a_rest_is_rarely_cut_short_for_nothing(share, spread, tested):
    """One traffic, coins for tokens on top of it: of 200 first rests at most eight (a share of 2 %; binomial, 5 standard errors)."""
    g, woken = torch.Generator().manual_seed(1), 0
    for _ in range(200):
        gate = versions.Gate()
        verdicts(gate, [-1.0] * 8)
        chance = (share + spread * torch.randn(64, generator=g)).clamp(0, 1)
        kept = torch.binomial(torch.full((64,), float(tested)), chance, generator=g).int().tolist()
        woken += not all([gate.rests(k, tested) for k in kept])
    assert woken <= 8, woken


def gated(gain=None, kind="head", **more):
    """A learner, whose comparisons come out as `gain` says if that is given, and a trace."""
    target = tiny_target()
    config = tiny_config(num_hidden_layers=1, tie_word_embeddings=True)
    draft = {"head": lambda: tiny_draft(target), "vocabulary": lambda: Draft(target, vocabulary=torch.arange(0, 17, 2)),
             "small model": lambda: SmallModel(config)}[kind]()
    target.feature_layers = draft.feature_layers
    learner = rl.Learner(draft, "log", 1e-2, 1.0, horizon=4, gate=True, **more)
    if gain is not None:
        learner.gate.judge = lambda d, lead, judge=learner.gate.judge: judge(gain)
    return learner, generate(target, learner.draft, request(new=30), 3)[0]


def copied(weights):
    return {name: value.clone() for name, value in weights.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", ["head", "vocabulary", "small model"])
def test_what_does_not_prove_better_is_taken_back(kind):
    """The weights that learn are the anchor's again, exactly, which served all along; while the learner rests nothing moves,
    but traces are remembered."""
    learner, trace = gated(-1.0, kind)
    begun = copied(learner.publish())
    assert [learner.update(trace)["verdict"] for _ in range(7)] == ["learns"] * 7
    assert not same(learner.draft.state_dict() | learner.average, begun)
    assert same(learner.publish(), begun)  # what is behind does not serve
    assert learner.update(trace)["verdict"] == "nothing gained"
    expected = rl.expected_length(learner.acceptance)  # what DraftLength is told, of what serves now
    assert expected == pytest.approx(rl.expected_length(rl.acceptance_on(learner.draft, trace, 4, 48)), abs=1e-5)
    assert same(learner.publish(), begun) and same(learner.draft.state_dict(), begun)
    assert learner.version == 0 and not any(o.state for o in learner.optimizers)
    assert "loss" not in learner.update(trace) and learner.unpublished == 0 and len(learner.recent) == 9
    assert same(learner.publish(), begun)


def test_whichever_is_ahead_serves():
    """By the sum of all comparisons since the anchor was set; and what is told of the acceptance is told of that one.  A
    version is what serves: none is made where the anchor goes on, and one at once where another draft takes its turn."""
    learner, trace = gated()
    gains, judge = iter([0.0, 1.0, 1.0, -3.0, 0.5, 1.0]), learner.gate.judge
    learner.gate.judge = lambda gain, lead: judge(next(gains))
    learner.update(trace)
    anchor = copied(learner.draft.state_dict() | learner.anchor[0])
    assert learner.unpublished == 0 and learner.publish() and learner.version == 0
    for ahead, due, version in ((True, float("inf"), 1), (True, 1, 2), (False, float("inf"), 3), (False, 0, 3), (True, float("inf"), 4)):
        expected = {which: rl.acceptance_on(twin_with(learner, weights), trace, learner.chain, 48) for which, weights in
                    ((False, learner.anchor[0]), (True, learner.average))}
        learner.update(trace)
        torch.testing.assert_close(torch.tensor(learner.acceptance), expected[ahead], atol=1e-6, rtol=0)
        assert learner.unpublished == due
        assert same(learner.publish(), learner.draft.state_dict() | learner.average if ahead else anchor)
        assert learner.version == version


def test_too_little_progress_is_taken_back_and_the_acceptance_told_is_the_anchors():
    learner, trace = gated()
    learner.gate.gains = [1.0, -1.0] * 31 + [0.9]  # of 63 answers; z is then in 0..1, and 2 is asked for
    learner.update(trace)
    assert learner.gate.resting and not learner.gate.ahead
    examined = copy.deepcopy(learner)
    examined.gate.gains, examined.gate.resting = [1.0, -1.0] * 31 + [0.9], 0
    for p in examined.average.values():
        p.add_(0.05)
    examined.gate.judge = lambda gain, lead, judge=examined.gate.judge: judge(0.0)
    expected = rl.acceptance_on(twin_with(examined, examined.anchor[0]), trace, examined.chain, 48)
    assert examined.update(trace)["verdict"] == "nothing gained"
    torch.testing.assert_close(torch.tensor(examined.acceptance), expected, atol=1e-6, rtol=0)


def test_the_draft_that_began_is_the_fallback_and_changes_places_with_what_serves():
    """After "better", and again after the next, it is examined as well, against what serves.  "falls back" serves it and learns on
    from it, and keeps what it replaces until something better is found again."""
    learner, trace = gated(1.0)
    begun = copied(learner.average)
    assert learner.fallback is None and [learner.update(trace)["verdict"] for _ in range(16)][7::8] == ["better"] * 2
    assert same(learner.fallback[0], begun) and not same(learner.anchor[0], begun)
    learn, heard, learned = learner.learn, [], []

    def judge(gain, lead):
        heard.append((gain, lead))
        learner.gate.ahead = False
        return "falls back"

    learner.gate.judge = judge
    for ahead in (True, False):
        for p in learner.average.values():
            p.add_(0.02)  # neither anchor nor fallback
        learner.averaged += 1
        learner.gate.ahead, now = ahead, copied(learner.average)
        there, other = copied(learner.anchor[0]), copied(learner.fallback[0])
        expected = [rl.expected_length(learner.examine(w, trace)) for w in (now, there, other)]
        assert len(set(expected)) == 3
        learner.learn = lambda trace, *_: learned.append(trace) or {}  # looked at before it learns on
        assert learner.update(trace)["verdict"] == "falls back" and learner.unpublished == float("inf")
        assert heard[-1] == pytest.approx((expected[0] - expected[1], expected[2] - (expected[0] if ahead else expected[1])), abs=1e-6)
        assert same(learner.anchor[0], other) and same(learner.fallback[0], now if ahead else there) and same(learner.average, other)
        published = learner.publish()
        assert all(torch.equal(published[name], w) and torch.equal(learner.trained[name], w) for name, w in other.items())
        assert rl.expected_length(learner.acceptance) == pytest.approx(expected[2], abs=1e-6) and not any(o.state for o in learner.optimizers)
    assert len(learned) == 2
    learner.learn, learner.gate.judge = learn, lambda gain, lead: "better"
    for fallback, leads in ((learner.anchor, []), (learner.begun, [1.0] * 5)):  # what spoke for one draft does not speak for another
        learner.fallback, learner.gate.leads = fallback, [1.0] * 5
        learner.update(trace)
        assert same(learner.fallback[0], begun) and learner.gate.leads == leads
    assert gated(1.0, scratch=True)[0].begun is None


def test_a_resumed_learner_serves_and_learns_as_the_one_that_was_saved():
    """Behind its anchor: the anchor serves, and what is learned by now is neither lost nor served."""
    learner, trace = gated(-1.0)
    learner.fallback, learner.begun = (copied(learner.average), 5), (copied(learner.average), 6)
    for _ in range(3):
        learner.update(trace)
    resumed = rl.Learner(twin_with(learner, learner.publish()), "log", 1e-2, 1.0, horizon=4, gate=True)
    resumed.restore(copy.deepcopy(learner.state()))
    assert same(resumed.publish(), learner.publish()) and same(resumed.average, learner.average)
    assert same(resumed.anchor[0], learner.anchor[0]) and not same(learner.average, learner.anchor[0])
    assert same(resumed.draft.state_dict(), learner.draft.state_dict()) and resumed.gate.gains == learner.gate.gains == [-1.0] * 3
    assert same(resumed.fallback[0], learner.fallback[0]) and resumed.fallback[1] == 5 and resumed.begun[1] == 6
    learner.gate.gains.append(7.0)
    assert resumed.gate.gains == [-1.0] * 3


@pytest.mark.parametrize("flags, chain, horizon", [([], 4, 160), (["--draft", "static"], 4, 60), (["--num-speculative-tokens", "2"], 2, 160),
                                                   (["--learn-every", "0", "--max-new-tokens", "100"], 4, 153), (["--learn-every", "20000"], 4, 1)])
def test_the_average_spans_as_many_tokens_whatever_a_step_takes(flags, chain, horizon):
    """What the driver's flags make of the learner: its chains, and 15360 tokens' steps in the average."""
    target = tiny_target()
    learner = aurora.new_learner(tiny_draft(target), {}, aurora.arguments(flags))
    assert (learner.chain, learner.horizon) == (chain, horizon)
    assert learner.averaged == (0 if "static" not in flags else 3 * horizon)


def test_flags_reach_the_learner_and_the_requests():
    flags = ["--estimator", "kl", "--target-side", "0.3", "--reservoir", "5", "--lr", "0.5", "--top-p", "0.9", "--top-k", "4", "--temperature", "0.6", "--seed", "3"]
    args, target = aurora.arguments(flags), tiny_target(vocab_size=257, bos_token_id=256)
    learner = aurora.new_learner(tiny_draft(target), {}, args)
    assert (learner.estimator, learner.target_side, learner.reservoir_size) == ("kl", 0.3, 5) and learner.optimizers[0].param_groups[0]["lr"] == 0.5
    one, other = aurora.make_requests([("a", "xy"), ("b", "xy")], args, model.Bytes(target.config), 2048)
    assert (one.prompt, one.kind, one.temperature, one.top_p, one.top_k) == ([256, 120, 121], "a", 0.6, 0.9, 4) and one.seed != other.seed
    (again,) = aurora.make_requests([("a", "xy")], aurora.arguments([]), model.Bytes(target.config), 2048)
    assert again.seed != one.seed and (again.top_p, again.top_k) == (1.0, 0)


@pytest.mark.parametrize("apart", [False, True])
def test_numbers_that_slow_a_processor_down_are_flushed_where_the_learner_works(apart):
    """And nowhere else.  After 140 steps of a random draft half of its time went into them."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush them")
    study = versions.Study(SimpleNamespace(version=0, state=dict, unpublished=0, restore=dict), 1, apart and (stand_in, None))
    assert tiny_product() > 0 == study.core.submit(tiny_product).result()
    study.core.shutdown()


def tiny_product():
    return (torch.full((64,), 1e-30) * 1e-10).max().item()


def stand_in(_):
    return None, None


def test_the_learner_multiplies_in_bfloat16_and_hardly_errs(monkeypatch):
    """Where the processor has such products: they are what replays, and the gradient is that of float32 up to rounding."""
    target = tiny_target(gain=2.0)
    draft, seen = tiny_draft(target), []
    trace, _ = generate(target, draft, request(new=40), 3)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # those alone are no faster
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr("draft.attend", lambda q, *a, f=model.attend, **k: (seen.append(q.dtype), f(q, *a, **k))[1])
    gradients = {}
    for fast in (False, True):
        learner = rl.Learner(twin(draft), "log", 1e-9, 1.0, places=10**6)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: gradients.update(
            {fast: torch.cat([p.grad.flatten().clone() for p in parameters if p.requires_grad])}) or torch.tensor(1.0))
        learner.update(trace)
        assert set(seen) == {torch.bfloat16 if fast else torch.float32} and all(p.dtype == torch.float32 for p in learner.draft.parameters())
        seen.clear()
    assert 0.99 < torch.cosine_similarity(gradients[True], gradients[False], 0) < 1 - 1e-7


@pytest.mark.parametrize("gate", [True, False])
def test_steps_come_with_tokens(monkeypatch, gate):
    """A step for every `every` tokens of answers, a long answer's several in one update, a short one's put off: it is judged and
    remembered all the same.  An update's first step is on the newest trace and others from memory, further ones on three of all
    that there are by then; no trace is twice in a step."""
    learner, trace = gated(every=100)
    learner.gate = learner.gate if gate else None
    traces, learned = [replace(trace, version=i) for i in range(9)], []
    tokens = len(trace.ids) - trace.prompt_length
    monkeypatch.setattr(learner, "loss", lambda trace, f=learner.loss: (learned.append(trace.version), f(trace))[1])
    told = [learner.update(t) for t in traces]
    due = [(i + 1) * tokens // 100 - i * tokens // 100 for i in range(9)]
    assert sum(due) == learner.updates == learner.averaged - 3 * learner.horizon >= 2 and learner.waiting == 9 * tokens % 100
    assert ["loss" in t for t in told] == [bool(n) for n in due] and ["expected_length" in t for t in told] == (9 * [True] if gate else [bool(n) for n in due])
    assert [t.version for t in learner.recent] == list(range(9)) and learned[::3] == [i for i, n in enumerate(due) if n]
    learner.every, learner.waiting = 1, 60 - tokens
    first, *more = (learned.clear(), learner.update(replace(trace, version=9)), [learned[i : i + 3] for i in range(0, 180, 3)])[2]
    assert len(learned) == 180 and learner.waiting == 0 and all(len(set(batch)) == 3 for batch in [first, *more])
    assert first[0] == 9 and {x for batch in more for x in batch} == set(range(10))  # one of ten is in 18 batches of 59, more or less
    learned.clear()
    learner.every = 0
    learner.update(trace)
    assert len(learned) == 3 and learner.waiting == 0
    if gate:
        assert len(learner.gate.gains) == 11 - due.index(1) - 1  # what is learned is the anchor until the first update


def test_what_serves_changes_at_an_answer_that_is_not_learned_from():
    """Ahead, and a version is due at once; "better" there makes it the anchor, and no comparison with itself takes it back.
    A resumed learner waits on where the last one stopped."""
    learner, trace = gated()
    tokens = len(trace.ids) - trace.prompt_length
    learner.every = 2 * tokens
    gains, judge = iter([5.0] + [1.0] * 10), learner.gate.judge
    learner.gate.judge = lambda gain, lead: judge(None if gain is None else next(gains), lead)
    said = []
    for n in range(14):
        said.append(learner.update(trace)["verdict"])
        if n == 2:
            assert learner.waiting == tokens and learner.gate.ahead and learner.unpublished == float("inf")
            assert same(learner.publish(), learner.draft.state_dict() | learner.average) and learner.version == 1
        if "better" in said:
            break
    learner.publish()
    assert said[-1] == "better" and (n, learner.waiting, learner.gate.ahead, learner.gate.gains) == (12, tokens, True, [])
    state = copy.deepcopy(learner.state())
    assert "loss" in learner.update(trace)
    assert learner.gate.ahead and learner.gate.gains == [] and learner.unpublished == 1
    resumed = rl.Learner(twin(learner.draft), "log", 1e-2, 1.0, horizon=4, gate=True, every=learner.every)
    resumed.restore(state)
    assert resumed.waiting == tokens and "loss" in resumed.update(trace)
    resumed.every = 10  # another run's: what waited for a step does not come as many
    resumed.restore(state)
    assert resumed.waiting == 9 < tokens


def test_a_rest_leaves_no_steps_to_be_made_up_for():
    """Its answers do not count, or the first one after it would bring many steps at once."""
    learner, trace = gated(-1.0)
    assert [learner.update(trace)["verdict"] for _ in range(8)][-1] == "nothing gained" and learner.gate.resting
    learner.every, learner.gate.resting, learner.waiting = 2 * (len(trace.ids) - trace.prompt_length), 3, 0
    told = [learner.update(trace) for _ in range(5)]
    assert told[0].keys() == {"verdict", "learn_seconds"} and [t["verdict"] for t in told] == ["rests"] * 3 + ["learns"] * 2
    assert ["loss" in t for t in told] == [False] * 4 + [True]


def twin_with(learner, weights):
    other = twin(learner.draft)
    other.load_state_dict(learner.draft.state_dict() | weights)
    return other


def test_what_proved_better_is_gone_back_to():
    learner, trace = gated(1.0)
    said = [learner.update(trace)["verdict"] for _ in range(7)]
    judged = copied(learner.publish())  # what the eighth answer examines
    assert said + [learner.update(trace)["verdict"]] == ["learns"] * 7 + ["better"]
    learner.gate.judge = lambda gain, lead: "nothing gained"
    learner.update(trace)
    assert same(learner.publish(), judged)


def test_a_random_draft_that_is_gone_back_to_is_averaged_as_it_was():
    learner, trace = gated(-1.0, scratch=True)
    for _ in range(8):
        learner.update(trace)
    assert learner.averaged == 0


def test_an_answer_is_examined_before_it_is_learned_from():
    """At first the anchor and what is learned are one, and there is no comparison; later it is that of what they expect.
    Examination changes nothing of what is learned."""
    target = tiny_target()
    gated, free = (rl.Learner(tiny_draft(target), "log", 1e-2, 1.0, chain=3, horizon=4, gate=gate) for gate in (True, False))
    anchor, gains = copy.deepcopy(gated.draft), []
    gated.gate.judge, gated.gate.ahead = lambda gain, lead: (gains.append(gain), "learns")[1], True
    for seed in range(3):
        trace, _ = generate(target, anchor, request(new=30, seed=seed), 3)
        learned = copy.deepcopy(anchor)
        learned.load_state_dict(gated.publish())
        expected = [rl.expected_length(rl.acceptance_on(d, trace, 3)) for d in (learned, anchor)]
        assert gated.update(trace)["expected_length"] == pytest.approx(expected[0], abs=1e-6)
        assert gains[-1] is None if seed == 0 else gains[-1] == pytest.approx(expected[0] - expected[1], abs=1e-6) and gains[-1] != 0
        free.update(trace)
        assert same(gated.publish(), free.publish()) and same(gated.draft.state_dict(), free.draft.state_dict())


def test_the_gate_knows_how_many_rounds_kept_a_token():
    """Of the rounds that drafted, however many tokens; plain rounds do not count."""
    learner, trace = gated()
    trace.draft_tokens, trace.num_accepted = torch.tensor([[1, 2, 3], [1, 2, -1], [-1, -1, -1], [4, -1, -1]]), torch.tensor([1, 2, 0, 0])
    seen = []
    learner.gate.rests = lambda kept, tested: seen.append((kept, tested)) or True
    learner.update(trace)
    trace.draft_tokens, trace.num_accepted = torch.full((2, 1), -1), torch.zeros(2, dtype=torch.int64)
    learner.update(trace)
    assert seen == [(2, 3), (0, 0)]


def test_gate_on_the_command_line(files, tmp_path, monkeypatch, capsys):
    """What is behind does not serve, and what gains nothing is taken back.  A run that does not learn keeps what served, and a
    resumed learner goes on comparing with the anchor where the last one stopped."""
    judge = versions.Gate.judge
    monkeypatch.setattr(versions.Gate, "judge", lambda self, gain, lead: judge(self, -1.0))
    (tmp_path / "p.txt").write_text("a prompt\n" * 12)
    (tmp_path / "short.txt").write_text("a prompt\n" * 4)

    def run(*more, prompts="p.txt", draft="static"):
        capsys.readouterr()
        aurora.main(["--target", f"{files}/target.pt", "--static", f"{files}/draft.pt", "--draft", draft, "--prompts", f"{tmp_path}/{prompts}",
                     "--max-new-tokens", "8", "--num-speculative-tokens", "2", "--learn-every", "0", "--log", f"{tmp_path}/l.jsonl", *more])
        lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
        return capsys.readouterr().out, [x for x in lines if x["arm"] == "online"]

    out, lines = run("--save", f"{tmp_path}/kept")
    assert [x["gate"] for x in lines] == ["learns"] * 7 + ["nothing gained"] + ["rests"] * 4
    assert [x["draft_version"] for x in lines] == [0] * 12 and [x["update_loss"] is None for x in lines] == [False] * 7 + [True] * 5
    assert "7 updates in 12 answers; found better 0 times, taken back 1 times (8), fell back 0 times" in out and ", gated" in out
    begun = load(files / "draft.pt")[1]
    assert same(load(tmp_path / "kept/v000000/draft.pt")[1], begun)
    out, lines = run("--no-gate", "--learn-every", "20")
    assert "gate" not in out.replace("gate_proj", "") and {x["gate"] for x in lines} == {None} and "a step every 20 tokens" in out
    updates = [0, 0] + [x["update_loss"] is not None for x in lines]  # what is learned while one is served, serves the next
    assert [x["draft_version"] for x in lines] == [sum(updates[: i + 1]) for i in range(12)] and 3 <= sum(updates) <= 5

    run("--save", f"{tmp_path}/two", prompts="short.txt")
    assert same(load(tmp_path / "two/v000000/draft.pt")[1], begun)  # what serves; what is learned is with the learner
    assert not same(begun | torch.load(tmp_path / "two/v000000.learner.pt")["average"], begun)
    for gate in ("--gate", "--no-gate"):
        run("--no-learn", gate, "--save", f"{tmp_path}/same{gate}", prompts="short.txt", draft=f"{tmp_path}/two")
        assert same(load(tmp_path / f"same{gate}/v000000/draft.pt")[1], begun)
        assert torch.load(tmp_path / f"same{gate}/v000000.learner.pt")["gate"] == torch.load(tmp_path / "two/v000000.learner.pt")["gate"]
    _, lines = run("--save", f"{tmp_path}/two", prompts="short.txt", draft=f"{tmp_path}/two")
    assert [x["gate"] for x in lines] == ["learns"] * 3 + ["nothing gained"]
    assert same(aurora.load_learner(tmp_path / "two", model.load_target(files / "target.pt")[0])[0].state_dict(), begun)


# ---- the driver: aurora.py ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The learner works in a thread, where a test can watch it; what makes it another process is in the value."""
    works_apart = aurora.works_apart
    monkeypatch.setattr(aurora, "works_apart", lambda *_: False)
    return lambda: monkeypatch.setattr(aurora, "works_apart", works_apart)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny byte-level target, a static draft for it, and a file of prompts."""
    folder = tmp_path_factory.mktemp("aurora")
    target = tiny_target(vocab_size=257, bos_token_id=256, suppress_tokens=(256,))
    save(folder / "target.pt", target.config, target.state_dict(), {})
    draft = Draft(target)
    save(folder / "draft.pt", draft.config, draft.state_dict(), {})
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {i}", "class": "ab"[i // 3]}) + "\n" for i in range(6)))
    return folder


def run(files, *more):
    fixed = [] if "--num-speculative-tokens" in more else ["--num-speculative-tokens", "4"]  # the same rounds every time
    aurora.main(["--target", f"{files}/target.pt", "--static", f"{files}/draft.pt", "--prompts", f"{files}/prompts.jsonl",
                 "--max-new-tokens", "12", "--learn-every", "0", *fixed, *more])


def test_compare_reports_all_arms_and_logs_every_request(files, tmp_path, capsys):
    run(files, "--compare", "--no-gate", "--report", f"{tmp_path}/r.json", "--log", f"{tmp_path}/l.jsonl")
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"config", "classes"} and set(report["classes"]) == {"a", "b"}
    for arms in report["classes"].values():
        assert set(arms) == {"plain", "static", "online"}
        for arm, s in arms.items():
            assert set(s) == {"requests", "tokens", "serve_seconds", "learn_seconds", "wait_seconds", "tokens_per_second",
                              "tokens_per_second_with_learning", "mean_acceptance_length", "acceptance_per_position",
                              "drafted_per_round", "latency_p50", "latency_p95"}
            assert s["requests"] == 3 and s["tokens"] == 36 and (s["learn_seconds"] > 0) == (arm == "online")
            assert abs(s["mean_acceptance_length"] - 1 - sum(s["acceptance_per_position"])) < 1e-9
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert len(lines) == 18 and [x["draft_version"] for x in lines if x["arm"] == "online"] == [0, 0, 1, 2, 3, 4]
    for x in lines:
        h = x["acceptance_histogram"]
        assert sum(h) == x["rounds"] and sum(i * n for i, n in enumerate(h)) == x["accepted"]
    assert "prompt 1" not in (tmp_path / "l.jsonl").read_text(), "prompts are the user's"
    assert "online" in capsys.readouterr().out


def test_every_arm_is_served_by_its_own_draft_and_rule(files, monkeypatch):
    """And what is published tells the online arm's rule, and no other, how often places are accepted now."""
    served, told, trust = [], [], DraftLength.trust
    monkeypatch.setattr(aurora, "seconds_per_round", lambda *_: [1.0 + 0.2 * K for K in range(9)])
    monkeypatch.setattr(aurora, "generate", lambda *a, **k: (served.append((len(a), a[1] and copy.deepcopy(a[1].state_dict()), a[3] if len(a) > 3 else k["K"])), generate(*a, **k))[1])
    monkeypatch.setattr(DraftLength, "trust", lambda self, acceptance: (told.append((self, acceptance)), trust(self, acceptance))[1])
    run(files, "--compare", "--no-gate", "--num-speculative-tokens", "auto")
    static = load(files / "draft.pt")[1]
    arms = {name: [(weights, rule) for n, weights, rule in served if (name == "online") == (n == 5) and (weights is None) == (name == "plain")] for name in aurora.ARMS}
    assert [len(arm) for arm in arms.values()] == [6, 6, 6] and all(rule == 0 for _, rule in arms["plain"])
    assert all(same(static, weights) for weights, _ in arms["static"]) and not same(static, arms["online"][0][0])
    (fixed,), (moving,) = ({id(rule): rule for _, rule in arms[name]}.values() for name in ("static", "online"))
    assert fixed is not moving and fixed.stops_early and moving.stops_early
    assert len(told) == 6 and all(rule is moving and len(acceptance) == 4 and min(acceptance) > 0 for rule, acceptance in told)


def test_only_drafts_with_probabilities_stop_early(monkeypatch):
    from draft import NGram

    monkeypatch.setattr(aurora, "seconds_per_round", lambda *_: [1.0] * 9)
    target = tiny_target()
    small, args = SmallModel(tiny_config(num_hidden_layers=2)), aurora.arguments(["--compare"])
    rules = [aurora.draft_lengths(target, draft, None, args)["online"] for draft in (tiny_draft(target), small, NGram(target.config))]
    assert [rule.stops_early for rule in rules] == [True, True, False]


@pytest.mark.parametrize("flags, learning, cuts", [([], True, False), (["--no-learn"], False, False), (["--top-p", "0.9"], True, True)])
def test_compiled_serving_is_told_what_learns_and_what_cuts(files, monkeypatch, flags, learning, cuts):
    """Weights that learn must not be packed into graphs: what is published would never serve."""
    seen = []
    monkeypatch.setattr(aurora, "compile_forwards", lambda *a, **k: seen.append((a, k)))
    run(files, "--compile", "--compare", *flags)
    ((_, (served, static), slots, learns), more), = seen
    assert (learns is served) == learning and (learns is None) != learning and static is not served and more == {"cuts": cuts} and slots >= 192


def test_the_table_holds_what_was_recorded(capsys):
    """Two answers of known rounds and seconds; plain decoding beside them."""
    journal = aurora.Journal(SimpleNamespace(no_learn=False, log=None), 2)

    def record(arm, seconds, drafted, accepted):
        trace = SimpleNamespace(draft_tokens=torch.tensor([[5] * n + [-1] * (4 - n) for n in drafted]), num_accepted=torch.tensor(accepted),
                                ids=torch.zeros(3 + sum(accepted) + len(accepted)), prompt_length=3, version=0)
        return journal.record(arm, Request([256], 99, 0, 1.0, "a"), trace, seconds)

    record("plain", 2.0, [0] * 8, [0] * 8)
    for seconds, drafted, accepted in ((1.0, [4, 0, 2], [3, 0, 2]), (3.0, [1, 0], [0, 0])):  # 8 and 2 tokens
        journal.learned(record("online", seconds, drafted, accepted), False, 0.5, 1.0)
    (line,) = [r for r in journal.records if r["arm"] == "plain"]
    assert (line["rounds"], line["plain_rounds"]) == (0, 8)
    s = journal.report()["a"]["online"]
    assert s["tokens"] == 10 and s["tokens_per_second"] == 2.5 and s["tokens_per_second_with_learning"] == 2.0 and s["drafted_per_round"] == 7 / 5
    assert s["mean_acceptance_length"] == pytest.approx(1 + 5 / 3) and s["acceptance_per_position"] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])
    assert (s["latency_p50"], s["latency_p95"]) == (3.0, 3.0) and s["learn_seconds"] == 2.0
    assert aurora.overlap([r for r in journal.records if r["arm"] == "online"]) == pytest.approx(5 / 7)  # two of those tested were rejected
    journal.print()
    _, plain, online = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert plain[:6] == ["a", "plain", "1", "4.0", "4.0", "1.00"]
    assert online == "a online 2 2.5 2.0 0.62 1.4 2.67 0.67 0.67 0.33 0.00 3.00 3.00 0.50".split()


def test_answers_are_examined_class_by_class():
    """Each class by its own answers, and as by hand."""
    target = tiny_target(gain=2.0)
    draft, asked = tiny_draft(target), [replace(request(seed=i, new=20), kind="ab"[i % 2]) for i in range(4)]
    found = aurora.examination(target, asked)(draft)
    for kind in "ab":
        lengths = [rl.expected_length(rl.acceptance_on(draft, generate(target, None, r, 0)[0], aurora.EXAMINED)) for r in asked if r.kind == kind]
        assert found[kind] == pytest.approx(sum(lengths) / 2, abs=1e-4)
    assert abs(found["a"] - found["b"]) > 1e-3


@pytest.mark.parametrize("more", [["--compare"], ["--compare", "--no-learn"], []])
def test_a_plot_of_whatever_there_is(files, tmp_path, monkeypatch, more):
    """Classes in turn, and a run that ends in the middle of a comparison: each dot at its request, no more dots than requests."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    served, drawn = [], []
    monkeypatch.setattr(aurora, "generate", lambda *a, **k: (served.append(1), generate(*a, **k))[1] if len(served) < (8 if more else 99) else 1 / 0)
    plot = pyplot.Axes.plot
    monkeypatch.setattr(pyplot.Axes, "plot", lambda self, x, y, *a, **k: (drawn.append((list(x), list(y))), plot(self, x, y, *a, **k))[1])
    with pytest.raises(ZeroDivisionError) if more else contextlib.nullcontext():
        run(files, "--log", f"{tmp_path}/l.jsonl", "--plot", f"{tmp_path}/p.png", *more)
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    online = [x for x in lines if x["arm"] == "online"]
    dots = {(x, y) for xs, ys in drawn for x, y in zip(xs, ys) if x == x}
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert online and {(i + 1, x["mean_acceptance_length"]) for i, x in enumerate(online)} <= dots and max(x for x, _ in dots) == len(online)


def test_what_is_published_is_what_serves(files, monkeypatch):
    """A version every two updates, each of which is made while the next request is served: requests 1 to 3 are served by the
    first weights, 4 and 5 by those that two updates made, 6 by those of four; every version differs from the last."""
    served, learned = [], []
    update = rl.Learner.update
    weights = lambda draft: torch.cat([p.detach().flatten() for p in draft.parameters()])
    published = lambda learner: torch.cat([learner.average.get(n, p).flatten() for n, p in learner.draft.named_parameters()])
    monkeypatch.setattr(aurora, "generate", lambda target, draft, *a, **k: (served.append(draft and weights(draft)), generate(target, draft, *a, **k))[1])
    monkeypatch.setattr(rl.Learner, "update", lambda self, trace: (update(self, trace), learned.append(published(self)))[0])
    run(files, "--publish-every", "2", "--no-gate")
    served = [w for w in served if w is not None]
    assert torch.equal(served[0], served[1]) and torch.equal(served[1], served[2]) and not torch.equal(served[2], served[3])
    assert torch.equal(served[3], learned[1]) and torch.equal(served[4], learned[1]) and torch.equal(served[5], learned[3])
    assert len(served) == len(learned) == 6  # the last answer is learned from as well


def test_the_learner_works_beside_serving(files, tmp_path, monkeypatch):
    """While the online arm serves a request, the answer before is learned from; while another arm serves, none is.  What
    serving then waits for counts.  Each waits for the other here, so were they not at work at once, neither would go on."""
    update, answer, main, served = rl.Learner.update, generate, threading.get_ident(), []
    learning, answered = threading.Event(), threading.Event()

    def watched_update(self, trace):
        assert threading.get_ident() != main
        learning.set()
        assert answered.wait(60)
        time.sleep(0.2)
        learning.clear()
        return update(self, trace) | {"learn_seconds": 0.5}

    def watched_generate(*a, **k):
        online = len(a) == 5  # whose version is told
        served.append((online, learning.wait(60) if online and (True, False) in served else learning.is_set()))
        answered.clear()
        out = answer(*a, **k)
        answered.set()
        return out

    monkeypatch.setattr(rl.Learner, "update", watched_update)
    monkeypatch.setattr(aurora, "generate", watched_generate)
    run(files, "--compare", "--report", f"{tmp_path}/r.json", "--log", f"{tmp_path}/l.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [meanwhile for online, meanwhile in served if online] == [False] + [True] * 5
    assert not any(meanwhile for online, meanwhile in served if not online)
    waits = [x["wait_seconds"] for x in lines if x["arm"] == "online"]
    assert len(waits) == 6 and all(w >= 0.15 for w in waits)
    assert all(x["wait_seconds"] == 0 for x in lines if x["arm"] != "online")
    for arms in json.loads((tmp_path / "r.json").read_text())["classes"].values():
        s = arms["online"]
        assert s["learn_seconds"] == pytest.approx(1.5) and s["tokens_per_second_with_learning"] == pytest.approx(36 / (s["serve_seconds"] + s["wait_seconds"]))


def test_learning_beside_serving_depends_on_no_clock(files, tmp_path, monkeypatch, here):
    """Whoever is done first, and in whatever process the learner is, the same seed learns the same, serves it to the same
    requests and leaves the same state behind."""
    logs, update, answer = [], rl.Learner.update, generate
    for slow in ("update", "generate", "neither", "apart"):
        pause = lambda name: time.sleep(0.1 if name == slow else 0.0)
        if slow == "apart":
            here()
        monkeypatch.setattr(rl.Learner, "update", lambda self, trace: (pause("update"), update(self, trace))[1])
        monkeypatch.setattr(aurora, "generate", lambda *a, **k: (pause("generate"), answer(*a, **k))[1])
        run(files, "--no-gate", "--target-side", "0.5", "--save", f"{tmp_path}/{slow}", "--log", f"{tmp_path}/l.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
        logs.append([{name: value for name, value in x.items() if "seconds" not in name} for x in lines if x["arm"] == "online"])
    assert logs[0] == logs[1] == logs[2] == logs[3] and all(x["update_loss"] for x in logs[0])
    saved = lambda name: torch.load(tmp_path / f"{name}/v000006/draft.pt")["weights"] | torch.load(tmp_path / f"{name}/v000006.learner.pt")["weights"]
    assert all(same(saved("update"), saved(name)) for name in ("generate", "neither", "apart"))
    assert torch.load(tmp_path / "apart/v000006.learner.pt")["updates"] == 6


def test_updates_that_are_not_due_come_back_from_the_other_process(files, tmp_path, here):
    """Six updates, a version after four: the two that are left make the one that is saved."""
    here()
    run(files, "--no-gate", "--publish-every", "4", "--save", f"{tmp_path}/kept")
    assert (tmp_path / "kept/latest").read_text() == "v000002\n"


def test_trouble_in_the_other_process_is_told_and_the_draft_kept(files, tmp_path, here):
    here()
    with pytest.raises(UserError, match="diverged.*weights"):
        run(files, "--lr", "1e38", "--save", f"{tmp_path}/kept")
    kept = aurora.load_learner(tmp_path / "kept", model.load_target(files / "target.pt")[0])
    assert all(p.isfinite().all() for p in kept[0].parameters()) and kept[1]["updates"] == 1


def test_what_was_learned_before_trouble_is_kept_though_it_never_served(files, tmp_path, monkeypatch):
    """No version is due before the hundredth update; the fourth breaks off, and the three before it are what is saved."""
    learn = rl.Learner.learn

    def breaks(self, trace, steps):
        if self.updates == 3:
            raise UserError("trouble")
        return learn(self, trace, steps)

    monkeypatch.setattr(rl.Learner, "learn", breaks)
    with pytest.raises(UserError, match="trouble"):
        run(files, "--draft", "static", "--no-gate", "--publish-every", "100", "--save", f"{tmp_path}/kept")
    assert (tmp_path / "kept/latest").read_text() == "v000001\n"
    weights, state = torch.load(tmp_path / "kept/v000001/draft.pt")["weights"], torch.load(tmp_path / "kept/v000001.learner.pt")
    began = torch.load(files / "draft.pt")["weights"]
    assert state["updates"] == 3 and all(torch.equal(weights[name], p) for name, p in state["average"].items())
    assert any(not torch.equal(weights[name], began[name]) for name in state["average"])


def test_the_draft_that_serves_is_examined_on_answers_nobody_learns_from(files, tmp_path, monkeypatch):
    """A version every two requests, so every other update leaves what serves, and its examination, as it was; the static
    draft and a run that does not learn stay where they are.  Examined prompts are of files that no traffic is cut from."""
    texts = {"traffic": ["".join(f"traffic {i}\n" for i in range(200))], "eval": ["".join(f"held out {i}\n" for i in range(200))]}
    monkeypatch.setattr(aurora, "texts_of", lambda kind, split: texts[split])
    asked, learned, update = [], [], rl.Learner.update
    monkeypatch.setattr(aurora, "examination", lambda target, requests, then=aurora.examination: (asked.extend(requests), then(target, requests))[1])
    monkeypatch.setattr(rl.Learner, "update", lambda self, trace: (learned.append(trace), update(self, trace))[1])

    def held_out(*more):
        aurora.main(["--target", f"{files}/target.pt", "--static", f"{files}/draft.pt", "--traffic", "python,cpp", "--requests", "2", "--compare",
                     "--num-speculative-tokens", "4", "--max-new-tokens", "12", "--learn-every", "0", "--log", f"{tmp_path}/l.jsonl",
                     "--report", f"{tmp_path}/r.json", *more])
        lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
        return [x["held_out"] for x in lines if x["arm"] == "online"], json.loads((tmp_path / "r.json").read_text())["held_out"]

    lengths, report = held_out("--publish-every", "2", "--no-gate")
    begun, static, ended = ({kind: report[kind][name] for kind in report} for name in ("begun", "static", "ended"))
    assert set(begun) == {"python", "cpp"} and lengths[0] == begun != lengths[1] == lengths[2] != lengths[3] == ended
    assert all(1 < length < aurora.EXAMINED + 1 for length in [*begun.values(), *static.values()])
    assert [r.kind for r in asked] == ["python", "python", "cpp", "cpp"] and all(b"held" in bytes(r.prompt[1:]) for r in asked)
    assert len(learned) == 4 and all(b"traffic" in bytes(t.ids[1 : t.prompt_length].tolist()) for t in learned)
    lengths, report = held_out("--no-learn", "--draft", "static")
    assert lengths == [static] * 4 and report["cpp"] == dict.fromkeys(("begun", "ended", "static"), static["cpp"])


def test_expected_length_is_the_acceptance_length_that_rounds_have():
    """Rounds from every place of many answers at a fixed K, against the formula: it is their mean, within 5 standard errors."""
    target = tiny_target()
    draft, K = tiny_draft(target), 3
    requests = [Request([1, 2, 3], 40, seed, 1.0) for seed in range(64)]
    served, plain = Generation(target, draft, requests, K), Generation(target, None, requests, 0)
    list(serve.decode(served, serve.FixedLength(K)))
    list(serve.decode(plain, serve.FixedLength(0)))
    lengths = torch.cat([1.0 + served.trace(b).num_accepted for b in range(64)])
    expected = aurora.mean([rl.expected_length(rl.acceptance_on(draft, plain.trace(b), K)) for b in range(64)])
    assert abs(lengths.mean() - expected) < 5 * lengths.std() / len(lengths) ** 0.5
    assert expected > 1.3


@pytest.mark.parametrize("extra", [["--dtype", "bfloat16"], ["--temperature", "0"], ["--num-speculative-tokens", "1"], ["--num-speculative-tokens", "auto"], ["--estimator", "reinforce", "--target-side", "0"], ["--estimator", "reinforce_textbook"], ["--estimator", "kl", "--target-side", "0.5"]])
def test_other_settings_run(files, capsys, extra):
    run(files, *extra)
    assert "online" in capsys.readouterr().out


def test_plain_decoding_is_measured_in_every_class_and_the_order_rotates():
    requests = [Request([256, 1], 1, i, 1.0, kind) for i in range(10) for kind in "abc"]
    plan = aurora.plan(requests, compare=False)
    assert [r for r, _ in plan] == requests
    for kind in "abc":
        assert sum("plain" in arms for r, arms in plan if r.kind == kind) == 4
    assert {arms[0] for _, arms in plan if len(arms) == 2} == {"plain", "online"}
    assert {arms[0] for _, arms in aurora.plan(requests, compare=True)} == {"plain", "static", "online"}


def test_same_seed_same_tokens_and_no_learn_keeps_the_draft(files, tmp_path):
    for name in ("x", "y"):
        run(files, "--draft", "static", "--no-learn", "--log", f"{tmp_path}/{name}", "--save", f"{tmp_path}/saved-{name}")
    x, y = ([json.loads(line) for line in (tmp_path / n).read_text().splitlines()] for n in "xy")
    assert [r["acceptance_histogram"] for r in x] == [r["acceptance_histogram"] for r in y]
    before, after = (torch.load(p, weights_only=True)["weights"] for p in (files / "draft.pt", tmp_path / "saved-y/v000000/draft.pt"))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_save_and_resume_continue_the_versions(files, tmp_path):
    run(files, "--save", f"{tmp_path}/kept", "--publish-every", "2", "--no-gate")
    assert (tmp_path / "kept/latest").read_text() == "v000003\n"
    run(files, "--draft", f"{tmp_path}/kept", "--save", f"{tmp_path}/kept", "--publish-every", "2", "--no-gate")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["latest", "v000003", "v000003.learner.pt", "v000006", "v000006.learner.pt"]
    state = torch.load(tmp_path / "kept/v000006.learner.pt", weights_only=True)
    assert state["updates"] == 12 and {int(s["step"]) for s in state["optimizers"][1]["state"].values()} == {12}
    run(files, "--draft", f"{tmp_path}/kept/v000003", "--no-learn", "--save", f"{tmp_path}/other")  # one version, by name
    first, second = (torch.load(p, weights_only=True)["weights"] for p in (tmp_path / "kept/v000003/draft.pt", tmp_path / "other/v000003/draft.pt"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert b"prompt 1" not in b"".join(p.read_bytes() for p in (tmp_path / "kept").rglob("*") if p.is_file())


def test_versions_go_on_where_the_learners_state_was_lost(files, tmp_path):
    """Nothing is written over, and no state of another run stands beside a new draft."""
    run(files, "--save", f"{tmp_path}/kept", "--publish-every", "2", "--no-gate")
    (tmp_path / "kept/v000003.learner.pt").rename(tmp_path / "kept/v000006.learner.pt")  # of a run that is gone
    draft = torch.load(tmp_path / "kept/v000003/draft.pt")
    run(files, "--draft", f"{tmp_path}/kept", "--save", f"{tmp_path}/kept", "--publish-every", "2", "--no-gate")
    assert same(torch.load(tmp_path / "kept/v000003/draft.pt")["weights"], draft["weights"]) and (tmp_path / "kept/latest").read_text() == "v000006\n"
    assert torch.load(tmp_path / "kept/v000006.learner.pt")["updates"] == 6
    aurora.save_learner(tmp_path / "kept", Draft(model.load_target(files / "target.pt")[0]), draft["weights"], 6, None)
    assert not (tmp_path / "kept/v000006.learner.pt").exists()


def test_a_version_is_found_from_within_its_directory(files, tmp_path, monkeypatch):
    run(files, "--save", f"{tmp_path}/kept", "--no-gate")
    monkeypatch.chdir(tmp_path / "kept/v000006")
    draft, state = aurora.load_learner(Path("."), model.load_target(files / "target.pt")[0])
    assert state["updates"] == 6


@pytest.mark.parametrize("wait", [0, 0.5])
def test_what_serves_outlives_the_process_that_learns(files, tmp_path, monkeypatch, here, wait):
    """It dies while the fourth request is served, or between that and the next: one line says so, and what served last is kept,
    without the learner's state."""
    here()
    served = []

    def generate_and_kill(target, draft, *a, **k):
        if draft is not None:
            served.append(copy.deepcopy(draft.state_dict()))
        if len(served) == 4:
            time.sleep(4 * wait)  # by then it is idle
            [child.kill() for child in multiprocessing.active_children()]
            time.sleep(wait)
        return generate(target, draft, *a, **k)

    monkeypatch.setattr(aurora, "generate", generate_and_kill)
    with pytest.raises(UserError, match="the process that learns died"):
        run(files, "--no-gate", "--save", f"{tmp_path}/kept")
    kept, state = aurora.load_learner(tmp_path / "kept", model.load_target(files / "target.pt")[0])
    kept_as = (tmp_path / "kept/latest").read_text().strip()[1:]
    assert len(served) == 4 and not same(served[3], served[0]) and state == {"version": int(kept_as)}
    assert (tmp_path / "kept/latest").read_text() == "v000003\n" if wait else same(kept.state_dict(), served[3])


def test_ctrl_c_is_not_for_the_process_that_learns(files, tmp_path, monkeypatch, here):
    """A terminal sends it to both; the one that serves decides."""
    here()

    def generate_and_interrupt(*a, **k):
        [os.kill(child.pid, signal.SIGINT) for child in multiprocessing.active_children()]
        return generate(*a, **k)

    monkeypatch.setattr(aurora, "generate", generate_and_interrupt)
    run(files, "--save", f"{tmp_path}/kept")
    assert aurora.load_learner(tmp_path / "kept", model.load_target(files / "target.pt")[0])[1]["updates"] == 6


def test_a_learner_that_does_not_arrive_is_one_line(files, monkeypatch, here):
    here()
    monkeypatch.setattr(aurora, "learner_apart", os.abort)
    with pytest.raises(UserError, match="the process that learns died"):
        run(files)


@pytest.mark.parametrize("more, behind", [(["--no-learn"], 0), ([], 2)])
def test_a_log_is_written_as_it_goes(files, tmp_path, monkeypatch, more, behind):
    """Without a learner at once; else an answer's line when it was learned from, so that the last two may be still to come."""
    told, record = [], aurora.Journal.record
    lines = lambda: len((tmp_path / "l.jsonl").read_text().splitlines())
    monkeypatch.setattr(aurora.Journal, "record", lambda *a: (record(*a), told.append(len(a[0].records) - lines()))[0])
    run(files, "--log", f"{tmp_path}/l.jsonl", *more)
    assert len(told) == lines() > 6 and max(told) == behind


@pytest.mark.parametrize("apart", [False, True])
def test_interrupt_keeps_what_was_served(files, tmp_path, monkeypatch, capsys, here, apart):
    served = []
    here() if apart else None

    def until_interrupted(*args, **kwargs):
        if len(served) == 3:
            raise KeyboardInterrupt
        served.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(aurora, "generate", until_interrupted)
    run(files, "--save", f"{tmp_path}/kept", "--report", f"{tmp_path}/r.json", "--log", f"{tmp_path}/l.jsonl")
    captured = capsys.readouterr()
    assert "interrupted" in captured.err and "online" in captured.out
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 3  # that nothing was learned from yet included
    assert (tmp_path / "kept/latest").exists() and (tmp_path / "r.json").exists()


def test_one_prompt_is_answered_without_colours_in_a_pipe(files, capsys):
    aurora.main(["--target", f"{files}/target.pt", "--static", f"{files}/draft.pt", "--draft", "static",
                 "--prompt", "hello", "--max-new-tokens", "12"])
    captured = capsys.readouterr()
    assert "\033" not in captured.out and "12 tokens" in captured.err


BAD = {
    "no checkpoint": ["--target", "nowhere.pt"],
    "not a checkpoint": ["--target", __file__],
    "should stand in": ["--report", "/nowhere/at/all.json"],
    "is a draft": ["--target", "DRAFT"],
    "not known|missing|shape|draft": ["--static", "TARGET", "--draft", "static"],
    "at least 1": ["--num-speculative-tokens", "0"],
    "learn-every must be at least 0": ["--learn-every", "-1"],
    "unknown class": ["--traffic", "python,perl"],
    "the order of --prompts": ["--in-turn", "--prompt", "x"],
    "empty": ["--prompt", ""],
    "does not fit": ["--prompt", "x" * 250],
    "cannot read": ["--prompts", "nowhere.txt"],
    "expected UTF-8": ["--prompts", "BROKEN"],
    "unrecognized": ["--frobnicate"],
    "invalid choice": ["--estimator", "magic"],
    "must be positive": ["--lr", "0"],
    "or at least 0.01": ["--temperature", "-1"],
    "holds no": ["--draft", "FOLDER"],
    "is a directory": ["--log", "FOLDER"],
    "cannot save in": ["--save", "BROKEN"],
    "versions of another run": ["--save", "HALF"],
    "needs a directory": ["--save", ""],
    "meta is not to be had": ["--device", "meta"],
    "different files": ["--log", "same", "--report", "same"],
    "is not to be had": ["--device", "nonsense"],
    "--seed must": ["--seed", "99999999999999999999999"],
    "not byte-level": ["--target", "OTHER", "--prompt", "x"],
    "not valid Unicode": ["--prompt", "\udc80"],
    "not allowed with": ["--prompt", "x", "--prompts", "y"],
    "only answers": ["--prompt", "x", "--save", "FOLDER"],
    "up to 8 drafted tokens": ["--compile", "--num-speculative-tokens", "9"],
    "only measures": ["--profile", "--compare"],
    "only measures, at every": ["--sweep", "--num-speculative-tokens", "4"],
    "ends in .png": ["--plot", "picture.xyz"],
    "cannot be read": ["--draft", "HALF"],
    "another version's": ["--draft", "OLD"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(files, tmp_path, message):
    (tmp_path / "broken.jsonl").write_text('{"prompt": 1\n')
    (tmp_path / "half/v000001").mkdir(parents=True)
    (tmp_path / "half/v000001/draft.pt").write_bytes((files / "draft.pt").read_bytes())
    (tmp_path / "half/v000001.learner.pt").write_text("not a learner")
    (tmp_path / "half/latest").write_text("v000001")
    (tmp_path / "old/v000001").mkdir(parents=True)
    (tmp_path / "old/v000001/draft.pt").write_bytes((files / "draft.pt").read_bytes())
    torch.save({"version": 1, "updates": 1}, tmp_path / "old/v000001.learner.pt")
    (tmp_path / "old/latest").write_text("v000001")
    other = tiny_target()
    save(tmp_path / "other.pt", other.config, other.state_dict(), {})
    names = {"HALF": tmp_path / "half", "OLD": tmp_path / "old", "OTHER": tmp_path / "other.pt", "DRAFT": files / "draft.pt", "TARGET": files / "target.pt", "BROKEN": tmp_path / "broken.jsonl", "FOLDER": tmp_path}
    arguments = ["--target", f"{files}/target.pt", "--static", f"{files}/draft.pt", *(str(names.get(a, a)) for a in BAD[message])]
    with pytest.raises(UserError, match=message) as error:
        aurora.main(arguments)
    assert "\n" not in str(error.value)


def test_a_wrong_kernel_choice_is_one_clear_line(files, monkeypatch):
    monkeypatch.setenv("AURORA_KERNEL", "magic")
    verify.kernel.cache_clear()
    try:
        with pytest.raises(UserError, match="AURORA_KERNEL must be"):
            aurora.main(["--target", f"{files}/target.pt", "--prompt", "x"])
    finally:
        verify.kernel.cache_clear()


def test_bad_input_exits_with_2_and_no_traceback(files):
    done = subprocess.run([sys.executable, HERE / "aurora.py", "--target", "nowhere.pt"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "nowhere.pt" in done.stderr


def test_a_target_that_gives_nan_is_one_line_and_what_was_served_is_kept(files, tmp_path, monkeypatch):
    config, weights, record = load(files / "target.pt")
    save(tmp_path / "t.pt", config, weights | {"lm_head.weight": 1e38 * weights["lm_head.weight"].sign()}, record)
    command = [sys.executable, HERE / "aurora.py", "--target", tmp_path / "t.pt", "--prompts", files / "prompts.jsonl",
               "--report", tmp_path / "r.json", "--save", tmp_path / "kept"]
    done = subprocess.run(command, capture_output=True, text=True)  # already while rounds are timed
    assert done.returncode == 2 and "Traceback" not in done.stderr and "without a distribution" in done.stderr.splitlines()[-1]
    done = subprocess.run([*command, "--num-speculative-tokens", "4"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "without a distribution" in done.stderr.splitlines()[-1]
    assert (tmp_path / "r.json").exists() and (tmp_path / "kept/latest").exists()


def test_a_new_head_is_slim():
    """Half the heads of a layer, in whole groups, and a third of its MLP, in multiples of 64 where it is large."""
    sizes = {(4, 2, 768): (2, 1, 256), (32, 8, 14336): (16, 4, 4736), (14, 2, 4864): (7, 1, 1600), (9, 3, 100): (4, 1, 33),
             (32, 1, 64): (16, 1, 21), (1, 1, 2): (1, 1, 1), (6, 3, 190): (3, 1, 63)}
    for (H, G, I), expected in sizes.items():
        c = slim(tiny_config(num_attention_heads=H, num_key_value_heads=G, intermediate_size=I))
        assert (c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) == expected and c.num_hidden_layers == 1


def test_vocabulary_mismatch_is_refused(files, tmp_path):
    other = tiny_target()
    save(tmp_path / "other.pt", Draft(other).config, Draft(other).state_dict(), {})
    with pytest.raises(UserError, match="vocabulary is 17, the target's 257"):
        run(files, "--draft", f"{tmp_path}/other.pt")


def test_a_draft_of_another_target_is_refused(files, tmp_path):
    wider = Draft(tiny_target(vocab_size=257, bos_token_id=256, suppress_tokens=(256,), hidden_size=48))
    save(tmp_path / "wider.pt", wider.config, wider.state_dict(), {})
    with pytest.raises(UserError, match="another target: they differ in hidden_size"):
        run(files, "--draft", f"{tmp_path}/wider.pt")
    config, weights, record = load(files / "draft.pt")
    save(tmp_path / "other.pt", replace(config, rope_theta=5e5), weights, record)
    with pytest.raises(UserError, match="another target: they differ in rope_theta"):
        run(files, "--draft", f"{tmp_path}/other.pt")


# ---- the corpus and the shipped weights --------------------------------------------------------------------


def test_held_out_lines_are_not_trained_on():
    """In the corpus of this machine no line of 60 characters or more is in two splits, nor in two classes."""
    home = {}
    for kind, splits in pretrain.corpus().items():
        for split, texts in splits.items():
            assert all(pretrain.split_of(name) == split for name, _ in texts)
            for line in {line.strip() for _, text in texts for line in text.split("\n")}:
                if len(line) >= 60:
                    assert home.setdefault(hash(line), (kind, split)) == (kind, split), line


def test_docs_are_cut_out_of_the_source():
    docs = {name: text for _, name, text in pretrain.documents(("traffic",), ("docs",))}
    runs = lambda text: set(zip(*([line.strip() for line in text.split("\n") if line.strip()][i:] for i in range(4))))
    for _, name, text in pretrain.documents(("traffic",), ("python",)):
        both = runs(docs.get(name, "")) & runs(text)  # a short docstring may share an example of a few words
        assert not [run for run in both if len("".join(run)) >= 120], f"{name} holds four lines of its own docs"


def test_repeats_are_removed():
    seen = set()
    block = "".join(f"    a line of some length, number {i}\n" for i in range(5))
    assert pretrain.without_repeats("first\n" + block, seen) == "first\n" + block
    assert pretrain.without_repeats("second\n" + block + "third\n", seen) == "second\nthird\n"


WEIGHTS = HERE / "weights"


def test_traffic_comes_in_blocks_or_in_turn(monkeypatch):
    """A class that is named again goes on with new text, and what is examined is asked for once."""
    texts = {kind: ["".join(f"{kind} line {i} of a file that is long enough\n" for i in range(400))] for kind in ("python", "cpp")}
    monkeypatch.setattr(aurora, "texts_of", lambda kind, split: texts[kind])
    served = lambda *more: aurora.built_in_prompts(aurora.arguments(["--requests", "3", *more]))
    blocks, turns, alone = served("--traffic", "python,cpp,python"), served("--traffic", "python,cpp", "--in-turn"), served("--traffic", "python")
    assert [kind for kind, _ in blocks] == ["python"] * 3 + ["cpp"] * 3 + ["python"] * 3 and len({text for _, text in blocks}) == 9
    assert [kind for kind, _ in turns] == ["python", "cpp"] * 3 and turns[::2] == alone
    assert all(text.startswith(kind) for kind, text in blocks + turns)
    args = aurora.arguments(["--traffic", "python,cpp,python", "--held-out", "2"])
    assert [r.kind for r in aurora.examined_requests(args, model.Bytes(model.load_target(args.target)[0].config), 2048)] == ["python"] * 2 + ["cpp"] * 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_shipped_weights_speculate(temperature):
    """The shipped target and static draft on their own traffic: close to two tokens a round or more."""
    args = aurora.arguments(["--traffic", "python", "--requests", "2", "--max-new-tokens", "48", "--temperature", str(temperature), "--draft", "static"])
    target, tokenizer, draft, _, _ = aurora.load_models(args)
    assert sum(p.numel() for p in target.parameters()) > 8e6 and (WEIGHTS / "target.pt").stat().st_size < 25e6
    for r in aurora.make_requests(aurora.built_in_prompts(args), args, tokenizer, 2048):
        trace, _ = generate(target, draft, r, 4)
        assert 1 + trace.num_accepted.float().mean() > 1.8
        assert 256 not in trace.ids[1:].tolist()
        if temperature == 0:
            plain, _ = generate(target, None, r, 0)
            a, b = plain.ids.tolist(), trace.ids.tolist()[: len(plain.ids)]
            first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
            if first is not None:
                top = answer_logits(plain)[first - plain.prompt_length].topk(2).values
                assert top[0] - top[1] < 1e-3


# ---- the kernel: kernels.cu ------------------------------------------------------------------------------------


def some_round(V, dtype=torch.float32, B=6, K=3, seed=0, noise=1.0):
    """A batch with a bit of everything: rows at their own temperature, greedy ones too, drafts of 1 to K tokens,
    impossible ids, a draft that is `noise` away from the target, and coins that are 0 or as close to 1 as they get."""
    g = torch.Generator().manual_seed(1000 * seed + V)
    target = 3 * torch.randn(B, K + 1, V, generator=g)
    draft = target[:, :K] + noise * torch.randn(B, K, V, generator=g)
    for logits in (target, draft):
        logits.masked_fill_(torch.rand(logits.shape, generator=g) < 0.1, float("-inf"))
        logits[..., V // 2] = 1.0  # no row without a possible id
    target, draft = target.to(dtype), draft.to(dtype)
    temperature = torch.tensor([1.0, 0.0, 0.3, 1.7, 0.8, 1.0])[torch.arange(B) % 6].double()
    uniform, coins = (torch.rand(B, n, dtype=torch.float64, generator=g) for n in (K, K + 1))
    tokens = inverse_cdf(probabilities(draft, temperature[:, None]), uniform)
    tokens[torch.arange(K) >= K - torch.arange(B)[:, None] % 3] = -1  # -1 pads: rows draft K, K-1, K-2, K, .. tokens
    coins[torch.rand(coins.shape, generator=g) < 0.1] = 0.0
    coins[torch.rand(coins.shape, generator=g) < 0.1] = 1 - 2**-53
    return [target, draft, tokens, coins, temperature]


def misplaced(target, draft, tokens, coins, temperature, num_accepted, next_token):
    """By how much probability each row's coins would have to move for the definition, in float64, to decide as was
    decided (B,): 0 where it does, tiny where a coin lay within rounding of a boundary, 1 for an impossible token."""
    target_p = probabilities(target, temperature[:, None])
    B, K = tokens.shape
    out = torch.zeros(B, dtype=torch.float64)
    for b, n in enumerate(num_accepted.tolist()):
        moves = [0.0]
        for k in range(min(n + 1, K)):
            x = tokens[b, k].item()
            if x < 0:
                moves.append(float(n > k))
                break
            one_hot = draft is None or temperature[b] == 0
            draft_q = torch.nn.functional.one_hot(torch.tensor(x), target_p.shape[-1]) if one_hot else probabilities(draft[b, k], temperature[b])
            p, q, coin = target_p[b, k, x].item(), draft_q[x].item(), coins[b, k].item()
            moves.append(max(0.0, coin * q - p if n > k else p - coin * q))
        mass = target_p[b, n]
        if n < K and tokens[b, n] >= 0:
            residual = (mass - draft_q).clamp(min=0)
            mass = residual if residual.sum() > 0 else mass
        cumulative, v = mass.cumsum(-1), next_token[b].item()
        at = coins[b, K] * cumulative[-1]
        moves.append(1.0 if mass[v] == 0 else max(0.0, (cumulative[v] - mass[v] - at).item(), (at - cumulative[v]).item()))
        out[b] = max(moves)
    return out


ROUNDING = 3e-7  # of probability: float32 exponentials
KERNEL_SIZES = [1, 31, 257, 1000, 4097, 32000, 50257, 128256, 151936]


def need_kernel():
    if not verify.kernel("cpu"):
        pytest.skip("no kernel on this machine: no compiler or no ninja, or AURORA_KERNEL=reference")


def assert_decided(decide, case, **more):
    """`decide` says what the definition says; where it does not, a coin was within rounding of a boundary."""
    decision = decide(*case, **more)
    same = torch.stack([a == b for a, b in zip(decision, accept_reference(*case))]).all(0)
    moved = misplaced(*case, *decision)
    assert (moved[same] < 1e-12).all(), "the measure itself"
    assert (moved < ROUNDING).all(), f"coins would have to move by {moved.tolist()}"
    assert same.sum() >= len(same) - 1  # and that is rare


@pytest.mark.parametrize("V", KERNEL_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_decides_as_the_definition(dtype, V):
    need_kernel()
    for seed in range(12 if V < 5000 else 1):
        case = some_round(V, dtype, seed=seed)
        target, draft, tokens, coins, temperature = case
        assert_decided(accept, case)
        if V < 50000 or dtype == torch.float32:
            assert_decided(accept, [target, None, tokens, coins, temperature])
            lse = (draft.double() / temperature.where(temperature > 0, 1.0)[:, None, None]).logsumexp(-1)
            assert_decided(accept, case, draft_lse=lse)


@pytest.mark.parametrize("V", [4, 1024, 65536])
def test_kernel_gives_a_coin_on_a_boundary_to_the_id_above(V):
    """V equal ids, V a power of two, so that every boundary i/V is exact."""
    need_kernel()
    i = torch.arange(0, V, max(1, V // 64))
    none = torch.empty(len(i), 0, dtype=torch.int64)
    drawn = accept(torch.zeros(1, 1, V).expand(len(i), 1, V), None, none, (i.double() / V)[:, None])[1]
    assert torch.equal(drawn, i)


def test_kernel_takes_a_draft_of_another_dtype():
    need_kernel()
    for a, b in itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2):
        target, draft, *rest = some_round(257)
        assert_decided(accept, [target.to(a), draft.to(b), *rest])


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_kernel_on_a_draft_that_is_nearly_the_target(noise):
    """target_p - draft_q is then the difference of nearly equal numbers; and with none, the residual is empty."""
    need_kernel()
    for seed in range(20):
        target, draft, tokens, coins, temperature = some_round(1000, noise=noise, seed=seed)
        draft = draft.where(target[:, :-1] > float("-inf"), float("-inf"))
        tokens = torch.randint(0, 1000, tokens.shape, generator=torch.Generator().manual_seed(seed))
        coins[:, :-1] = 1 - 1e-3 * coins[:, :-1]
        coins[coins == 1] = 1 - 2**-53
        case = [target, draft, tokens, coins, temperature]
        assert (misplaced(*case, *accept(*case)) < ROUNDING).all()


def test_kernel_finds_the_residual_of_equal_rows_empty():
    """p - q is 0 then, not what a fused multiply-add leaves of it: the token is drawn from target_p as a whole."""
    need_kernel()
    row = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    row[5] = float("-inf")
    target, coins = row.expand(200, 2, 1000), uniforms(200, 2)
    case = [target, target[:, :1], torch.full((200, 1), 5), coins, torch.linspace(0.2, 2, 200).double()]
    decision = accept(*case)
    assert (decision[0] == 0).all() and all(torch.equal(a, b) for a, b in zip(decision, accept_reference(*case)))


def test_kernel_draws_the_tail_at_its_rate_out_of_a_residual_too():
    """Beside a kept mass of 1, ids that target_p has over draft_q by 1e-7 and 2e-7: the coin's thirds draw them."""
    need_kernel()
    V = 200_000
    target, draft = torch.full((1, 2, V), float("-inf")), torch.full((1, 1, V), float("-inf"))
    target[0, 0, [7, 100, V - 1]] = torch.tensor([1.0, 1e-7, 2e-7]).log()
    draft[0, 0, [7, 8]] = torch.tensor([1.0, 1e-8]).log()
    for coin, token in ((0.0, 100), (0.3333, 100), (0.3334, V - 1), (1 - 2**-53, V - 1)):
        n, drawn = accept(target, draft, torch.tensor([[8]]), torch.tensor([[0.5, coin]], dtype=torch.float64))
        assert n.item() == 0 and drawn.item() == token


def test_kernel_adds_up_what_is_small():
    """One id of weight 1 and 199,999 of 1e-8, which are 0.002 together and nothing to a float32 sum that holds the 1:
    whether that id is kept, and which is drawn, for coins 1e-6 to either side of its probability."""
    need_kernel()
    target = torch.full((4, 2, 200_000), 1e-8).log()
    target[:, :, 0] = 0.0
    p = 1 / (1 + 199_999 * torch.tensor(1e-8).log().double().exp().item())
    coins = torch.tensor([[p - 1e-6, 0.5], [p + 1e-6, 0.5], [0.5, p - 1e-6], [0.5, p + 1e-6]], dtype=torch.float64)
    n, token = accept(target, None, torch.zeros(4, 1, dtype=torch.int64), coins)
    assert n.tolist() == [1, 0, 1, 1] and token[[0, 2]].tolist() == [0, 0]
    assert abs(token[1].item() - 100_000) < 10 and 90 < token[3].item() < 110


def test_kernel_divides_by_the_temperature_more_finely_than_float32():
    """200,000 ids, all 12.2 below one, halve the probability; 1 / T rounded to float32 would move it by 8e-8."""
    need_kernel()
    slopes = 1 / torch.linspace(0.9, 1.1, 999).double() / torch.tensor(2.0).double().log()
    T = 1 / slopes[((slopes.float().double() - slopes) / slopes).argmax()].item() / torch.tensor(2.0).double().log().item()
    target = torch.full((2, 2, 200_000), -12.2)
    target[..., 0] = 0.0
    p = (target[0, 0].double() / T).softmax(-1)[0].item()
    coins = torch.tensor([[p - 4e-8, 0.5], [p + 4e-8, 0.5]], dtype=torch.float64)
    assert accept(target, None, torch.zeros(2, 1, dtype=torch.int64), coins, T)[0].tolist() == [1, 0]


def test_kernel_reads_rows_of_any_stride():
    """A pitch larger than V, a batch that is one row expanded, ids that do not lie side by side, sliced coins, and an
    odd address; what lies between the rows is NaN."""
    need_kernel()
    target, draft, tokens, coins, temperature = some_round(257)
    wide = [torch.full((6, x.shape[1], 300), float("nan")) for x in (target, draft)]
    for x, y in zip(wide, (target, draft)):
        x[..., 3:260] = y
    wide_coins = torch.full((6, 9), 7.0, dtype=torch.float64)
    wide_coins[:, 1::2] = coins
    expected = accept(target, draft, tokens, coins, temperature)
    for t, d, c in ((wide[0][..., 3:260], wide[1][..., 3:260], coins), (target, draft, wide_coins[:, 1::2]),
                    (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (target, draft)), coins)):
        assert all(torch.equal(a, b) for a, b in zip(accept(t, d, tokens, c, temperature), expected))
    one = [x[:1].expand(6, *x.shape[1:]) for x in (target, draft)]
    case = [*one, tokens[:1].expand(6, -1), coins, temperature]
    assert all(torch.equal(a, b) for a, b in zip(accept(*case), accept(*(x.contiguous() for x in case))))


@pytest.mark.parametrize("strides", [(2**29, 2**30, 1), (2**31, 2**10, 1)])
def test_kernel_addresses_more_than_2_to_the_31_elements(strides):
    need_kernel()
    case = some_round(100, torch.bfloat16, B=2)
    case[1], case[2], case[3][:, :3], case[4][:] = case[0][:, :3], torch.full((2, 3), 50), 0.0, 1.0  # all kept, all read
    try:
        room = torch.empty(2**32, dtype=torch.bfloat16)  # 8 GB of addresses; a few pages are written
    except RuntimeError as error:
        pytest.skip(f"no room for 8 GB of addresses: {error}")
    far = room.as_strided((2, 4, 100), strides)
    far.copy_(case[0])
    decision = accept(far, *case[1:])
    assert decision[0].tolist() == [3, 3] and all(torch.equal(a, b) for a, b in zip(decision, accept(*case)))


def test_kernel_reports_what_is_broken_and_accepts_none_of_it():
    """One status per batch row, from the operator; NaN in a row that is read is never kept, at any temperature."""
    need_kernel()
    target, draft, tokens, coins, temperature = some_round(300, B=12)
    for bad in (float("nan"), float("inf")):
        for greedy in (False, True):
            t, rows = torch.full((12,), 0.0 if greedy else 1.0, dtype=torch.float64), target.clone()
            rows[::2, 0, 299] = bad
            kept, _, status = torch.ops.aurora.accept(rows, draft, None, tokens, coins.zero_(), t)
            assert status.tolist() == [4, 0] * 6 and (kept[::2] == 0).all()
            with pytest.raises(ValueError, match=r"without a distribution.*\[0, 2, 4, 6, 8, 10\]"):
                accept(rows, draft, tokens, coins, t)
            spoiled = draft.clone()
            spoiled[:, 0, 299] = bad
            if not greedy:
                kept, _, status = torch.ops.aurora.accept(target, spoiled, None, tokens, coins, t)
                assert (status[tokens[:, 0] >= 0] == 4).all() and (kept == 0).all()
                lse = torch.full((12, 3), float("-inf" if bad > 0 else "nan"), dtype=torch.float64)
                assert (torch.ops.aurora.accept(target, draft, lse, tokens, coins, t)[2][tokens[:, 0] >= 0] == 4).all()
    nothing = torch.full((1, 1, 300), float("-inf"))
    for t in (0.0, 1.0):
        with pytest.raises(ValueError, match="without a distribution"):
            accept(nothing, None, torch.empty(1, 0, dtype=torch.int64), uniforms(1, 1), t)
    for wrong in ([target[:, :3], draft], [target, draft[:, :2]], [target.double(), draft], [target.transpose(0, 1), draft]):
        with pytest.raises(RuntimeError, match="does not fit"):  # who calls the operator itself is not let past the end
            torch.ops.aurora.accept(*wrong, None, tokens, coins, temperature)


UNREADABLE = """
import ctypes, mmap, torch
from verify import accept, kernel
page = mmap.PAGESIZE
V = 2 * page // 4
kernel("cpu")
def rows(*pages):  # (1, n, V) float32 zeros, a row is two pages; how many of them can be read
    x = torch.frombuffer(mmap.mmap(-1, 2 * len(pages) * page), dtype=torch.float32).view(1, -1, V).zero_()
    for k, n in enumerate(pages):
        if n < 2:
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(x[0, k].data_ptr() + n * page), (2 - n) * page, 0) == 0
    return x
tokens, coins = torch.full((1, 3), 5), torch.tensor([[0.0, 0.0, 0.0, 0.5]], dtype=torch.float64)
target = rows(2, 0, 0, 0)
target[0, 0, 5] = float("-inf")
assert accept(target, rows(2, 0, 0), tokens, coins)[0].item() == 0  # rejected at once: one row of each
print("early exit", flush=True)
lse = torch.full((1, 3), float(V), dtype=torch.float64).log()
assert accept(rows(2, 2, 2, 2), rows(1, 1, 1), tokens, coins, draft_lse=lse)[0].item() == 3  # kept: the token's logit
print("lse", flush=True)
assert accept(rows(2, 0, 0, 0), rows(0, 0, 0), tokens, coins, 0.0)[0].item() == 0  # greedy: nothing of the draft
assert accept(rows(2, 0, 0, 0), rows(0, 0, 0), torch.full((1, 3), -1), coins)[0].item() == 0  # a pad: target_p alone
print("done", flush=True)
"""


def test_kernel_reads_no_row_that_it_does_not_need():
    """Rows after the stop, and what is not needed of the draft's: on pages whose reading ends the process."""
    need_kernel()
    done = subprocess.run([sys.executable, "-c", UNREADABLE], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.split() == ["early", "exit", "lse", "done"], done.stderr[-2000:]


def test_kernel_decides_a_row_alone_as_in_a_batch_on_two_threads_as_on_one():
    need_kernel()
    case = some_round(32000, torch.bfloat16, B=12)
    one = accept(*case)
    torch.set_num_threads(2)
    two = accept(*case)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    for b in range(12):
        assert all(torch.equal(a, x[b : b + 1]) for a, x in zip(accept(*(x[b : b + 1] for x in case)), one))


def test_kernel_is_a_torch_operator():
    need_kernel()
    target, draft, tokens, coins, temperature = some_round(31)
    for arguments in ([target, draft, None, tokens, coins, temperature], [target.requires_grad_(), None, None, tokens, coins, temperature],
                      [target[:0], draft[:0], None, tokens[:0], coins[:0], temperature[:0]]):
        torch.library.opcheck(torch.ops.aurora.accept.default, arguments)
    run = lambda x: torch.ops.aurora.accept(2 * x, draft, None, tokens, coins, temperature)[1] + 1
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(target), run(target))


LOCKSTEP = """
#include <barrier>
#include <cstdlib>
#include <thread>

struct Lockstep {  // LOCKSTEP_TEAM threads on every batch row; they meet at a board where each leaves its number
  static constexpr int W = 16;
  int64_t rank, size;
  double* board;
  std::barrier<>& gate;
  template <class Fold> double meet(double x, Fold fold) {
    board[rank] = x;
    gate.arrive_and_wait();
    double all = board[0];
    for (int64_t i = 1; i < size; i++) all = fold(all, board[i]);
    gate.arrive_and_wait();
    return all;
  }
  double max(double x) { return meet(x, [](double a, double b) { return a > b ? a : b; }); }
  void sum(double* x, int n) { for (int i = 0; i < n; i++) x[i] = meet(x[i], [](double a, double b) { return a + b; }); }
};

void run(const Round& r, int) {
  const int size = atoi(getenv("LOCKSTEP_TEAM"));
  std::vector<double> board(size);
  std::barrier<> gate(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; rank++)
    threads.emplace_back([&, rank] {
      Lockstep team{rank, size, board.data(), gate};
      for (int64_t b = 0; b < r.B; b++) decide(team, r, b);
      gate.arrive_and_drop();  // if they came to differ, and so meet no more, the test is to fail and not to hang
    });
  for (auto& thread : threads) thread.join();
}
STABLE_TORCH_LIBRARY(aurora_lockstep, library) {
  library.def("accept(Tensor target_logits, Tensor? draft_logits, Tensor? draft_lse, Tensor draft_tokens, Tensor coins, "
              "Tensor temperature) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(aurora_lockstep, CPU, library) { library.impl("accept", TORCH_BOX(&accept)); }
"""


@pytest.fixture(scope="module")
def lockstep(tmp_path_factory):
    """The kernel's lines up to its teams, with a team of CPU threads in their place."""
    need_kernel()
    source = tmp_path_factory.mktemp("lockstep") / "lockstep.cu"
    source.write_text((HERE / "kernels.cu").read_text().split("// ---- teams")[0] + LOCKSTEP)
    verify.load_kernel("cpu", source)

    def decide(target, draft, tokens, coins, temperature):
        kept, token, status = torch.ops.aurora_lockstep.accept(target, draft, None, tokens, coins, temperature)
        assert (status == 0).all()
        return kept, token

    return decide


@pytest.mark.parametrize("team", [1, 2, 7])
@pytest.mark.parametrize("V", [1, 31, 1000, 20_000])
def test_kernel_decides_alike_whatever_the_team(lockstep, monkeypatch, V, team):
    """Tiles of 16 ids, as on a GPU: a reduction that is forgotten, or a part of the row that nobody reads, shows."""
    monkeypatch.setenv("LOCKSTEP_TEAM", str(team))
    for seed in range(4):
        target, draft, tokens, coins, temperature = some_round(V, seed=seed)
        assert_decided(lockstep, [target, draft, tokens, coins, temperature])
    assert_decided(lockstep, [target, None, tokens, coins, temperature])


def test_kernel_takes_minus_zero_for_greedy():
    need_kernel()
    case = some_round(257)[:4]
    for x, y in zip(accept(*case, -0.0), accept(*case, 0.0)):
        assert torch.equal(x, y)


def test_without_a_compiler_the_reference_takes_over_with_one_warning(tmp_path, monkeypatch):
    case = some_round(31)
    expected = accept_reference(*case)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    try:
        for choice, warned in (("", 1), ("reference", 0), ("fused", None), ("magic", None)):
            monkeypatch.setenv("AURORA_KERNEL", choice)
            verify.kernel.cache_clear(), verify.load_kernel.cache_clear()
            if warned is None:
                with pytest.raises((RuntimeError, ValueError), match="[Nn]inja|AURORA_KERNEL"):
                    accept(*case)
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    assert all(torch.equal(a, b) for a, b in zip(accept(*case), expected))
            assert len([w for w in caught if "kernels.cu" in str(w.message)]) == warned
        assert not list(tmp_path.iterdir())
    finally:
        verify.kernel.cache_clear(), verify.load_kernel.cache_clear()


def test_kernel_compiles_for_cuda(tmp_path):
    """Compiled, not run: nvcc for sm_80, sm_90 and sm_100, against whatever build of torch is here."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on this machine")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(["nvcc", "-std=c++20", *architectures, "--threads", "3", "-isystem", include, "-Werror", "all-warnings",
                           "-c", HERE / "kernels.cu", "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("V", KERNEL_SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_kernel_decides_as_the_definition(self, dtype, V):
        assert verify.kernel("cuda"), "not built"
        decide = lambda *case: [x.cpu() for x in accept(*(x if x is None else x.cuda() for x in case))]
        for seed in range(3):
            case = some_round(V, dtype, seed=seed)
            assert_decided(decide, case)
            assert_decided(decide, [case[0], None, *case[2:]])

    def test_kernel_can_be_captured_in_a_graph(self):
        assert verify.kernel("cuda"), "not built"
        case = [x.cuda() for x in some_round(32000, torch.bfloat16)]
        case.insert(2, None)
        first = torch.ops.aurora.accept(*case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            second = torch.ops.aurora.accept(*case)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- real checkpoints: checkpoint.py -------------------------------------------------------------------------

LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
HF_KINDS = {  # what to build with transformers: (class, what differs from the sizes below)
    "llama": ("Llama", dict(num_key_value_heads=4)),
    "llama tied": ("Llama", dict(tie_word_embeddings=True, head_dim=16)),
    "llama biased": ("Llama", dict(attention_bias=True)),
    "llama 3": ("Llama", dict(head_dim=16, rope_parameters=LLAMA3_ROPE | {"rope_theta": 1e3}, eos_token_id=[3, 5])),  # some frequencies blend
    "qwen2": ("Qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3 tied": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True, attention_bias=True)),
}


def hf_model(folder, kind="qwen3", seed=0, layers=8, **changes):
    """A tiny random model, biases and norms random too, saved by transformers -> it."""
    transformers = pytest.importorskip("transformers")
    name, more = HF_KINDS[kind]
    sizes = dict(vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(sizes | more | changes)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5) + ("norm" in n and "bias" not in n))
    model.eval().save_pretrained(folder, max_shard_size="20KB" if seed % 2 else "1GB")
    return model


def edit(path, **changes):
    """Changes fields of a .json file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture(scope="module")
def checkpoint():
    pytest.importorskip("safetensors")
    import checkpoint

    return checkpoint


@pytest.mark.parametrize("kind", HF_KINDS)
def test_logits_are_those_of_transformers(checkpoint, tmp_path, kind):
    """Prompts of 1 to 300 tokens, whole and through the cache, token by token and in blocks; sharded and not."""
    theirs = hf_model(tmp_path, kind, seed=list(HF_KINDS).index(kind))
    ours = checkpoint.load_model(tmp_path, torch.float32)
    assert (tmp_path / "model.safetensors.index.json").exists() == (list(HF_KINDS).index(kind) % 2 == 1)
    ids = torch.randint(211, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for length in (1, 2, 63, 300):
            expected = theirs(ids[:, :length]).logits
            torch.testing.assert_close(ours.logits(ours(ids[:, :length])[0]), expected, atol=1e-4, rtol=0)
        cache, got, at = ours.new_cache(2, 300), [], 0
        for width in (290, 1, 1, 5, 3):
            got.append(ours(ids[:, at : at + width], torch.arange(at, at + width).expand(2, -1), cache)[0])
            at += width
        torch.testing.assert_close(ours.logits(torch.cat(got, 1)), expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.5, "logits that hardly differ show nothing"
        half = checkpoint.load_model(tmp_path, torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert (half.logits(half(ids)[0]).float() - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("kind", ["llama 3", "qwen3"])
def test_both_spellings_of_rope_and_of_eos(checkpoint, tmp_path, kind):
    hf_model(tmp_path, kind, layers=2)
    new = checkpoint.load_model(tmp_path, torch.float32).config
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw["rope_parameters"]
    theta = rope.pop("rope_theta")
    for name in ("rope_type", "type"):
        scaling = {(name if k == "rope_type" else k): v for k, v in rope.items()} if kind == "llama 3" else None
        edit(tmp_path / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
        assert checkpoint.load_model(tmp_path, torch.float32).config == new
    (tmp_path / "generation_config.json").unlink()
    for given, expected in ((7, (7,)), ([7, 9], (7, 9)), (None, ())):
        edit(tmp_path / "config.json", eos_token_id=given)
        assert checkpoint.load_model(tmp_path, torch.float32).config.eos_token_ids == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3]}')
    edit(tmp_path / "config.json", eos_token_id=7)
    assert checkpoint.load_model(tmp_path, torch.float32).config.eos_token_ids == (3,)


REFUSED = {  # what the message must say: changes of config.json
    "mixture of experts": dict(model_type="qwen3_moe"),
    "is a mixture": dict(num_experts=8),
    "'mistral' is not supported": dict(model_type="mistral"),
    "sliding window": dict(use_sliding_window=True, sliding_window=64),
    "a sliding window": dict(layer_types=["full_attention", "sliding_attention"]),
    "quantised": dict(quantization_config={"quant_method": "fp8"}),
    "'yarn' is not supported": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "of type 'linear'": dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
    "llama3 needs factor": dict(rope_parameters=dict(rope_type="llama3", factor=0, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)),
    "needs factor": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
    "part of the head": dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    "the same in every layer": dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
    "hidden_act 'gelu'": dict(hidden_act="gelu"),
    "num_hidden_layers = '2'": dict(num_hidden_layers="2"),
    "num_key_value_heads = '2'": dict(num_key_value_heads="2"),
    "do not divide": dict(num_key_value_heads=3),
    "cannot be understood": dict(rope_parameters="default"),
    "understood .TypeError": dict(rope_parameters={"rope_theta": [1e4]}),
    "understood .ValueError": dict(eos_token_id="</s>"),
    "vocab_size = None": dict(vocab_size=None),
    "missing": dict(num_hidden_layers=3),
    "not known to this model": dict(num_hidden_layers=1),
    "has shape": dict(intermediate_size=64),
    "is not the embedding": dict(tie_word_embeddings=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(checkpoint, tmp_path, message):
    hf_model(tmp_path, layers=2)
    edit(tmp_path / "config.json", **REFUSED[message])
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_model(tmp_path, torch.float32)
    assert "\n" not in str(error.value)


def test_broken_directories_are_refused(checkpoint, tmp_path):
    hf_model(tmp_path, layers=2)
    file, load = tmp_path / "model.safetensors", lambda: checkpoint.load_model(tmp_path, torch.float32)
    whole = file.read_bytes()
    from safetensors.torch import load_file, save_file

    for changed, message in ((lambda w: w | {"model.norm.weight": w["model.norm.weight"] * float("nan")}, "NaN"),
                             (lambda w: w | {"model.norm.bias": w["model.norm.weight"].clone()}, "not known"),
                             (lambda w: w | {"model.norm.weight": w["model.norm.weight"].to(torch.float8_e4m3fn)}, "quantised")):
        save_file(changed(load_file(file)), tmp_path / "other")
        file.write_bytes((tmp_path / "other").read_bytes())
        with pytest.raises(UserError, match=message):
            load()
        file.write_bytes(whole)
    load()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load()
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickles are never read"):
        load()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(UserError, match="no ../model"):
        load()
    index.unlink()
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected a JSON object"):
        load()


@pytest.mark.parametrize("kind", ["llama 3", "qwen3 tied"])
def test_weights_are_mapped_not_copied(checkpoint, tmp_path, kind):
    """In the dtype of the file every parameter is the mapped file itself; in another one none is, and nothing keeps the
    mapping alive.  Tied heads are one tensor in both."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are read in /proc")
    hf_model(tmp_path, kind, layers=2).to(torch.bfloat16).save_pretrained(tmp_path)

    def mappings():
        lines = [x.split() for x in Path("/proc/self/maps").read_text().splitlines() if x.endswith(f"{tmp_path}/model.safetensors")]
        return [range(*(int(x, 16) for x in line[0].split("-"))) for line in lines]

    for dtype, mapped in ((torch.bfloat16, True), (torch.float32, False)):
        model = checkpoint.load_model(tmp_path, dtype)
        gc.collect()
        assert {any(p.data_ptr() in r for r in mappings()) for p in model.parameters()} == {mapped}
        assert bool(mappings()) == mapped and {p.dtype for p in model.parameters()} == {dtype}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == ("tied" in kind)


def bpe(folder, whole_words=False):
    """A tokenizer.json trained here: byte-level, so that é is two tokens; or in words, with their spaces at the front."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, pre_tokenizers, processors, trainers

    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer, t.decoder = (pre_tokenizers.Metaspace(), decoders.Metaspace()) if whole_words else (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    alphabet = [] if whole_words else pre_tokenizers.ByteLevel.alphabet()
    text = ["the quick brown fox jumps over the lazy dog, and the dog says hello"] * 3
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=290 if alphabet else 60, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    return t


def test_streamed_text_is_whole_characters_and_all_of_it(checkpoint, tmp_path):
    config = tiny_config(vocab_size=400, bos_token_id=1)
    for whole_words, text in ((False, "the dog says: été, 你好, 🙂‍↔️, naïve — “quotes” fox"), (True, "the dog jumps over the quick fox")):
        inner = bpe(tmp_path / str(whole_words), whole_words)
        tokenizer = checkpoint.Tokenizer(config, tmp_path / str(whole_words))
        ids = inner.encode(text).ids
        assert ids[0] == 1
        put, end = tokenizer.stream()
        pieces = [put(i) for i in ids]
        assert "".join(pieces) + end() == text
        assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 8
        put, end = tokenizer.stream()  # an answer that stops within a character: what there is of it is shown at the end
        cut = inner.encode("dog é", add_special_tokens=False).ids[:-1] if not whole_words else ids[:1]
        assert "".join(map(put, cut)) + end() == ("dog \ufffd" if not whole_words else "")


def test_the_begin_token_is_not_doubled_and_foreign_ids_are_refused(checkpoint, tmp_path):
    bpe(tmp_path)
    tokenizer = checkpoint.Tokenizer(tiny_config(vocab_size=400, bos_token_id=1), tmp_path)
    assert tokenizer.encode("<s>hello</s>") == tokenizer.encode("hello</s>") and tokenizer.encode("<s>hello")[:2] != [1, 1]
    assert tokenizer.encode("hello</s>")[-1] == 2, "special tokens can be written out, as chat templates do"
    with pytest.raises(UserError, match="the tokenizer gives id"):
        checkpoint.Tokenizer(tiny_config(vocab_size=20), tmp_path).encode("hello")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer.json that can be read"):
        checkpoint.Tokenizer(tiny_config(), tmp_path)


def test_missing_extras_and_unreachable_names_are_one_line(checkpoint, tmp_path, monkeypatch):
    hf_model(tmp_path, layers=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(UserError, match="needs safetensors: pip install -r requirements-hf.txt"):
            checkpoint.load_model(tmp_path, torch.float32)
        patch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(UserError, match="no/such is no directory here.*pip install"):
            aurora.main(["--target", "no/such"])
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no/such is no directory here and could not be fetched.*no network") as error:
        aurora.main(["--target", "no/such"])
    assert "\n" not in str(error.value)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert checkpoint.locate("some/name") == tmp_path


def drafts_for(target, folder):
    """One of each kind, each with what it asks of the target."""
    import checkpoint
    from draft import NGram

    small = checkpoint.load_draft(folder / "small", target)
    pruned = Draft(target, vocabulary=torch.arange(1, target.config.vocab_size, 3))
    return {"head": tiny_draft(target), "pruned head": pruned, "small model": small, "ngram": NGram(target.config)}


@pytest.fixture(scope="module")
def hf(checkpoint, tmp_path_factory):
    """A random Qwen3 target of 8 layers with a tokenizer, and a Llama of 2 layers with the same vocabulary."""
    folder = tmp_path_factory.mktemp("hf")
    hf_model(folder / "target", "qwen3", vocab_size=290)
    hf_model(folder / "small", "llama", seed=2, layers=2, vocab_size=290)
    bpe(folder / "target")
    bpe(folder / "small")
    (folder / "prompts.txt").write_text("the quick brown fox\nhello dog\nthe dog says hello, the dog says\nover the lazy dog\n")
    return folder


def asking(target, draft):
    target.feature_layers = (2, 4, 5) if draft is None or draft.feature_layers is None else draft.feature_layers
    return target


@pytest.mark.parametrize("name", ["plain", "head", "pruned head", "small model", "ngram"])
def test_greedy_answers_are_those_of_generate(checkpoint, hf, name, K=3):
    """Token for token up to the end token, plain and with every kind of draft; two prompts, with and without an end."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf / "target")
    target = checkpoint.load_model(hf / "target", torch.float32).eval()
    draft = drafts_for(target, hf).get(name)
    asking(target, draft)
    for seed in range(2):
        prompt = torch.randint(3, 290, (7,), generator=torch.Generator().manual_seed(seed)).repeat(2).tolist()
        answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0].tolist()
        for stop in ((), (answer[14 + 11],)):
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=list(stop) or None)[0].tolist()
            target.config.eos_token_ids = stop
            trace, _ = generate(target, draft, Request(prompt, 30, seed, 0.0), 0 if name == "plain" else K)
            assert trace.ids.tolist()[: len(expected)] == expected and (len(trace.ids) == len(expected) or not stop)
            assert len(trace.answer_hidden()) == len(trace.ids) - 14 == len(trace.features) - 13
            assert int((trace.num_accepted + 1).sum()) == len(trace.ids) - 14


def test_an_end_token_ends_its_row_only(K=3):
    """Drafted or the target's own, at any place of a round; the other rows go on as if alone."""
    target, seen = tiny_target(gain=2.0, dtype=torch.float64), set()
    requests = [request(length=4 + i, new=30, seed=i, temperature=1.0) for i in range(9)]
    free = [generate(target, tiny_draft(target), r, K)[0] for r in requests]
    target.config.eos_token_ids = (3, 9)
    batch, widths = Generation(target, tiny_draft(target), requests, K), [0] * len(requests)
    while not batch.done:
        output = batch.round()
        widths = [new if out else old for out, new, old in zip(output, batch.drafted, widths)]
    for b, (r, whole) in enumerate(zip(requests, free)):
        answer = whole.ids[whole.prompt_length :].tolist()
        ends = [i for i, t in enumerate(answer) if t in (3, 9)]
        expected = answer[: ends[0] + 1] if ends else answer
        trace = batch.trace(b)
        assert trace.ids[trace.prompt_length :].tolist() == expected
        assert int((trace.num_accepted + 1).sum()) == len(expected)
        if ends:  # where in its round the end token came, and whether it had been drafted and kept there
            last = len(trace.starts) - 1
            n, kept = int(trace.num_accepted[-1]), int(whole.num_accepted[last]) > int(trace.num_accepted[-1])
            assert widths[b] == (n if kept else K)  # a drafted end token was not rejected
            seen.add((n, kept))
    assert {kept for _, kept in seen} == {True, False} and len(seen) > 2, "some ways to end never occurred"


@pytest.mark.parametrize("name", ["head", "pruned head", "small model"])
def test_every_draft_replays_what_it_served(checkpoint, hf, name, K=4):
    """As for the head above: same logits to 1e-5, for prompts of different lengths in one batch; and behaviour is that
    of the law that served, top-k and top-p included."""
    target = checkpoint.load_model(hf / "target", torch.float32).eval()
    draft = drafts_for(target, hf)[name]
    asking(target, draft)
    requests = [Request(torch.randint(3, 290, (3 + 8 * i,)).tolist(), 25, i, t, top_p=p, top_k=k)
                for i, (t, p, k) in enumerate([(1.0, 1.0, 0), (0.7, 0.8, 0), (1.4, 0.9, 20)])]
    run, served, propose = Generation(target, draft, requests, K), [], draft.propose
    draft.propose = lambda *a: (proposed := propose(*a), served.append(proposed[1]))[0]
    while not run.done:
        run.round()
    for b, r in enumerate(requests):
        trace = run.trace(b)
        logits = torch.stack([x[b] for x in served[: len(trace.starts)]])
        replayed = rl.replay_rounds(draft, trace).detach()
        if draft.vocabulary is not None:
            assert replayed.shape[-1] == len(draft.vocabulary) + 1 and replayed[..., -1].isneginf().all()
            replayed = torch.full_like(logits, float("-inf")).index_copy(-1, draft.vocabulary, replayed[..., :-1])
        finite = logits.isfinite()
        assert (replayed - logits)[finite].abs().max() < 1e-5
        assert finite.all() == (name != "pruned head" and r.top_p == 1) and finite.any(-1).all()
        log_q = (logits / r.temperature).log_softmax(-1).gather(-1, trace.draft_tokens[..., None]).squeeze(-1)
        torch.testing.assert_close(log_q, trace.behaviour_logprobs, atol=1e-5, rtol=0)


def test_small_model_drafts_as_it_would_decode(checkpoint, hf, K=4):
    """At temperature 0 its K tokens are the K that it would generate itself after the committed text, in every round."""
    target = checkpoint.load_model(hf / "target", torch.float32).eval()
    small = drafts_for(target, hf)["small model"]
    trace, _ = generate(asking(target, small), small, Request([1, 5, 100, 7], 24, 0, 0.0), K)
    small.feature_layers = ()
    for start, tokens in zip(trace.starts.tolist(), trace.draft_tokens):
        alone, _ = generate(small, None, Request(trace.ids[: start + 2].tolist(), K, 0, 0.0), 0)
        assert alone.ids[start + 2 :].tolist() == tokens.tolist()


def test_prompt_lookup():
    from draft import NGram

    draft = NGram(tiny_config())
    look = lambda text, K=4: draft.lookup(torch.tensor(text), K).tolist()
    assert look([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [4, 5, 9, 1]  # the last three stood before
    assert look([1, 2, 3, 4, 7, 2, 3, 5, 8, 2, 3]) == [5, 8, 2, 3]  # of two matches the later
    assert look([7, 2, 3, 5, 5, 9, 3, 6, 2, 3]) == [5, 5, 9, 3]  # two tokens count more than one that stood later
    assert look([5, 6, 7, 6]) == [7, 6, 7, 6] and look([4, 4]) == [4, 4, 4, 4]  # a copy goes on with itself
    assert look([1, 2, 3]) == [-1] * 4 and look([1]) == [-1] * 4
    cache = draft.new_cache(2, 12)  # rows of different lengths: what lies past a row's last token is not text
    sampling = verify.Sampling([(0.0, 1.0, 0)] * 2)
    ids, positions = torch.tensor([[3, 4, 3, 4], [8, 9, 8, 9]]), torch.arange(4).expand(2, -1)
    tokens, logits, logprobs = draft.propose(None, ids, positions, torch.tensor([3, 2]), torch.zeros(2, 2), sampling, cache)
    assert logits is None and not logprobs.any() and tokens.tolist() == [[3, 4], [9, 8]]
    tokens, _, _ = draft.propose(None, torch.tensor([[5, -1], [1, 8]]), torch.tensor([[4, 5], [3, 4]]), torch.tensor([0, 1]), torch.zeros(2, 2), sampling, cache)
    assert tokens.tolist() == [[-1, -1], [1, 8]]


def test_prompt_lookup_that_finds_nothing_is_plain_decoding():
    """No row is verified for what was not drafted, and nothing is put down as rejected."""
    from draft import NGram

    target, ask = tiny_target(gain=2.0), Request([16, 1, 2, 3], 20, 0, 0.0)
    run = Generation(asking(target, NGram(target.config)), NGram(target.config), [ask], 3)
    rows, verify_rows = [], target.verify
    target.verify = lambda ids, *a: (rows.append(ids.shape[1]), verify_rows(ids, *a))[1]
    list(serve.decode(run, FixedLength(3)))
    trace = run.trace(0)
    assert rows[0] == 1 and not trace.drafted()[0] and trace.drafted().any() and rows == [4 if x else 1 for x in trace.drafted()]
    assert trace.ids.tolist() == generate(target, None, ask, 0)[0].ids.tolist()


@pytest.mark.parametrize("name", ["small model", "pruned head", "ngram"])
def test_law_of_generated_text_with_every_draft_and_cut(name, B=2800, K=2):
    """As above, the joint law of three tokens over all 4^3 continuations, now under top-k and top-p that differ by row,
    cut from the target's own probabilities as written out here."""
    from draft import NGram

    target = tiny_target(gain=2.0, vocab_size=5, bos_token_id=4, suppress_tokens=(4,))
    small = SmallModel(tiny_config(vocab_size=5, num_hidden_layers=2, suppress_tokens=(4,), bos_token_id=4))
    draft = {"small model": small, "pruned head": Draft(target, vocabulary=torch.tensor([0, 2, 3])), "ngram": NGram(target.config)}[name]
    asking(target, draft)
    prompt, laws = [4, 1, 2, 0, 3, 3], [(0.8, 1.0, 0), (1.3, 0.75, 0), (1.0, 1.0, 2), (1.5, 0.8, 3)]
    run = Generation(target, draft, [Request(prompt, 3, b, laws[b % 4][0], "", *laws[b % 4][1:]) for b in range(B)], K)
    while not run.done:
        run.round()
    texts = list(itertools.product(range(4), repeat=3))
    with torch.no_grad():
        logits = target.logits(target(torch.tensor([prompt + list(x) for x in texts]))[0]).double()[:, 5:8]
    for i, (temperature, top_p, top_k) in enumerate(laws):
        p = (logits / temperature).softmax(-1)
        order = p.argsort(-1, descending=True)
        ranked = p.gather(-1, order)
        ranked[..., top_k or 5 :] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        p = torch.zeros_like(p).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))
        if top_p < 1 or top_k:
            assert (p[..., :4] == 0).any(), "nothing was cut"
        p = p.gather(-1, torch.tensor(texts)[..., None]).prod(1)[:, 0]
        counts = Counter(tuple(ids[6:9]) for ids in run.committed[i::4])
        assert_law([counts[x] for x in texts], p)


@pytest.mark.parametrize("V", [50, 5000])
def test_cuts_are_those_of_transformers(V):
    """Same ids kept as by transformers' warpers (temperature, top-k, top-p in that order) for every setting, rows of one
    batch with their own; long tails that do not fit into the first look included; ties stay together."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(6, 2, V, generator=torch.Generator().manual_seed(V)).double() * torch.tensor([0.1, 1, 3, 1, 0.01, 2])[:, None, None]
    temperature = torch.tensor([1.0, 0.7, 1.3, 0.0, 1.0, 1.1], dtype=torch.float64)
    top_p, top_k = torch.tensor([0.5, 0.9, 1.0, 0.5, 0.95, 0.7], dtype=torch.float64), torch.tensor([0, 0, 7, 3, 0, V // 2])
    got = verify.keep_top(logits, temperature, top_p, top_k)
    for b in range(6):
        expected = logits[b]
        if temperature[b] > 0:
            expected = expected / temperature[b]
            if top_k[b]:
                expected = warpers.TopKLogitsWarper(int(top_k[b]))(None, expected)
            expected = warpers.TopPLogitsWarper(float(top_p[b]))(None, expected)
        assert torch.equal(got[b].isfinite(), expected.isfinite())
        assert torch.equal(got[b][got[b].isfinite()], logits[b][got[b].isfinite()])
        assert torch.equal(verify.keep_top(*(x[b : b + 1] for x in (logits, temperature, top_p, top_k))), got[b : b + 1])
    assert torch.equal(verify.keep_top(logits, temperature, torch.ones(6), torch.zeros(6, dtype=torch.int64)), logits)
    one = lambda x, p, k: verify.keep_top(torch.tensor([x]), torch.ones(1), torch.tensor([p]), torch.tensor([k]))[0].isfinite().tolist()
    assert one([2.0, 1.0, 1.0, 0.0], 1.0, 2) == [True, True, True, False]  # equals stay together
    assert one([2.0, float("-inf"), 1.0, 0.0], 1e-9, 0) == [True, False, False, False]  # never nothing
    assert one([2.0, float("-inf"), 1.0, float("-inf")], 1.0, 3) == [True, False, True, False]
    for bad in (float("nan"), float("inf")):  # what is broken stays broken, for acceptance to find
        with pytest.raises(ValueError, match="without a distribution"):
            cut = verify.keep_top(torch.tensor([[[0.0, bad, 1.0]]]), torch.ones(1), torch.tensor([0.5]), torch.tensor([2]))
            accept(cut, None, torch.empty(1, 0, dtype=torch.int64), uniforms(1, 1))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("estimator", rl.ESTIMATORS)
def test_a_pruned_draft_learns_against_all_of_the_target(estimator, temperature, K=3):
    """Loss and gradient in the draft's own few columns equal those over the whole vocabulary, with the ids that it
    cannot say at -inf: the target's probabilities are not renormalised to them."""
    target = tiny_target(gain=2.0, dtype=torch.float64)
    draft = Draft(target, vocabulary=torch.tensor([0, 2, 3, 7, 8, 11, 15])).double()
    trace, _ = generate(target, draft, request(new=40, temperature=temperature), K)
    answer = trace.ids[trace.prompt_length :]
    assert not torch.isin(answer, draft.vocabulary).all(), "the target said nothing that the draft cannot say"

    def wide(logits):
        return torch.full((*logits.shape[:-1], 17), float("-inf"), dtype=torch.float64).index_copy(-1, draft.vocabulary, logits[..., :-1])

    for side in (0.0, 1.0):
        loss = rl.Learner(draft, estimator, 1e-3, side, chain=K).loss(trace)
        if side == 0:
            expected = rl.policy_gradient_loss(wide(rl.replay_rounds(draft, trace)), target_logits(trace)[:, :-1], trace.draft_tokens,
                                               temperature, estimator, trace.behaviour_logprobs)
        else:
            place = torch.arange(len(answer))[:, None] + torch.arange(K)
            tokens = answer[place.clamp(max=len(answer) - 1)].masked_fill(place >= len(answer), -1)
            rows = answer_logits(trace)[place.clamp(max=len(answer) - 1)]
            expected = rl.target_side_loss(wide(rl.replay_answer(draft, trace, K)[0]), rows, tokens, temperature, estimator)
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-9)
        ours, theirs = (torch.autograd.grad(x, draft.fc.weight, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
        assert ours.abs().max() > 0


def test_the_learner_cuts_as_serving_did(K=3):
    """target_rows is what acceptance was given.  draft_rows is what the draft tokens were drawn from wherever its cut
    kept all that the target's kept, and elsewhere has what the target kept besides, with a gradient."""
    target = tiny_target(gain=2.0)
    draft, more, same = tiny_draft(target), 0, 0
    for top_p, top_k in ((0.7, 0), (1.0, 4), (0.9, 5)):
        served, filters = [], verify.Sampling.filter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify.Sampling, "filter", lambda self, logits: (served.append(filters(self, logits)), served[-1])[1])
            trace, _ = generate(target, draft, Request(request().prompt, 40, 0, 0.9, "", top_p, top_k), K)
        rows = [torch.cat(served[i : i + K], 1)[0] for i in range(0, len(served), K + 1)], [x[0, :K] for x in served[K :: K + 1]]
        drafted, verified = (torch.stack(x) for x in rows)  # (R, K, V)
        target_logits, _ = rl.target_rows(draft, trace, trace.target_hidden[:, :-1], trace.draft_tokens)
        torch.testing.assert_close(target_logits, verified, atol=1e-5, rtol=0)
        logits = rl.draft_rows(rl.replay_rounds(draft, trace), target_logits, trace)
        finite = drafted.isfinite()
        torch.testing.assert_close(logits[finite], drafted[finite], atol=1e-5, rtol=0)
        assert torch.equal(logits.isfinite(), finite | verified.isfinite())
        given_back = verified.isfinite() & ~finite
        more, same = more + int(given_back.any(-1).sum()), same + int((~given_back.any(-1)).sum())
    assert more and same, "one of the two cases never occurred"


@pytest.mark.parametrize("top_p, top_k", [(0.7, 0), (1.0, 4), (0.9, 5)])
def test_the_target_is_cut_before_it_is_seen_in_a_pruned_vocabulary(top_p, top_k):
    """The ids that the draft cannot say are cut one by one, as in serving, not as the one that stands for them all."""
    target = tiny_target(gain=2.0, dtype=torch.float64)
    draft = Draft(target, vocabulary=torch.tensor([0, 2, 3, 7, 8, 11, 15])).double()
    trace, _ = generate(target, draft, Request(request().prompt, 40, 0, 0.9, "", top_p, top_k), 3)
    rows, _ = rl.target_rows(draft, trace, trace.target_hidden, trace.draft_tokens)
    served = verify.Sampling([(0.9, top_p, top_k)]).filter(target_logits(trace))
    p = (served / 0.9).softmax(-1)[..., draft.vocabulary]
    assert (p == 0).any()
    torch.testing.assert_close((rows / 0.9).softmax(-1)[..., :-1], p)


@pytest.mark.parametrize("top_p, top_k", [(0.7, 0), (1.0, 4), (1.0, 0)])
def test_what_the_gate_measures_is_what_serves(top_p, top_k):
    """The acceptance of a draft on an answer is that of its distribution as serving cuts it: what learning gives back to it
    serves nobody.  Here by probabilities written out, at the first place of chains all over the answer."""
    target = tiny_target(gain=2.0)
    draft = tiny_draft(target)
    trace, _ = generate(target, draft, Request(request().prompt, 40, 0, 0.9, "", top_p, top_k), 3)
    starts = torch.arange(trace.prompt_length, len(trace.ids)) - 2
    with torch.no_grad():
        drafted = draft.replay(trace.features[None], trace.ids[None, 1:], starts[None], torch.zeros(1, len(starts), 0, dtype=torch.int64))[0, :, 0]

    def law(logits):  # (V,) -> probabilities, the least likely cut
        p, order = (logits / 0.9).softmax(-1).sort(descending=True)
        p[top_k or len(p) :] = 0
        p = p / p.sum()
        p[p.cumsum(-1) - p >= top_p] = 0
        return torch.zeros_like(p).scatter(0, order, p / p.sum())

    own = [torch.minimum(law(q), law(p)).sum() for q, p in zip(drafted, answer_logits(trace), strict=True)]
    torch.testing.assert_close(rl.acceptance_on(draft, trace, 1)[0], torch.stack(own).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, lr, growth", [("random head under top-p", 3e-2, 2.0), ("small model", 3e-2, 1.2)])
def test_serving_teaches_every_draft(kind, lr, growth, K=3):
    """As above: 8 requests, and the expected accepted tokens of held-out answers have grown.  Under top-p = 0.7 the cuts
    of a random draft and of the target hardly meet: it learns only if the learner gives back what the draft's own cut
    dropped, and what counts is what is accepted with nothing given back."""
    from draft import SmallModel

    target, small = tiny_target(gain=2.0), SmallModel(tiny_config(num_hidden_layers=2))
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        for p in small.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.02)
        small.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        small.lm_head.weight.copy_(target.lm_head.weight)
    torch.manual_seed(0)
    draft, law = (small, ()) if kind == "small model" else (Draft(target), ("", 0.7, 0))
    asking(target, draft)
    ask = lambda seed: Request(request(seed=seed).prompt, 40, seed, 0.7, *law)
    held = [generate(target, None, ask(1000 + i), 0)[0] for i in range(4)]
    learner = rl.Learner(draft, "log", lr, 0.0, every=13)  # three steps an answer
    cut = verify.Sampling([(0.7, *(law[1:] or (1.0, 0)))]).filter

    def accepted():
        with torch.no_grad():
            rows = [rl.replay_answer(draft, x, K) for x in held]
            return sum(-rl.target_side_loss(cut(logits), *more, 0.7).item() for logits, *more in rows) / len(held)

    before = accepted()
    for seed in range(8):
        learner.update(generate(target, draft, ask(seed), K)[0])
    assert accepted() > growth * before, (before, accepted())


def test_a_trace_is_small_whatever_the_vocabulary(K=4):
    """Every round rejected at once, the most rows a token: bytes do not depend on V, grow with D as a line, and the line
    stays under 100 KB a token at D = 2048 in float32."""
    def per_token(D, V):
        target = tiny_target(hidden_size=D, vocab_size=V, suppress_tokens=(), bos_token_id=None)
        draft = RightDraft(torch.zeros(0, dtype=torch.int64))
        draft.propose = lambda features, ids, positions, last, coins, *_: (torch.zeros(1, K, dtype=torch.int64), one_hot, torch.zeros(1, K))
        one_hot = torch.full((1, K, V), -1e9).index_fill_(-1, torch.tensor([0]), 0.0)
        with torch.no_grad():
            target.lm_head.weight[0] = 0  # with logits that vary, the target hardly ever says 0
        trace, _ = generate(target, draft, Request([1, 2], 30, 0, 1.0), K)
        assert trace.num_accepted.sum() <= 3
        tensors = [x for x in vars(trace).values() if isinstance(x, torch.Tensor)]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors), "a view keeps all of its storage alive"
        return sum(x.nbytes for x in tensors) / (len(trace.ids) - 2), len(trace.starts) / (len(trace.ids) - 2)

    (small, _), (large_v, _), (large_d, _) = per_token(32, 200), per_token(32, 20_000), per_token(64, 200)
    assert abs(small - large_v) < 0.1 * small
    assert small + (large_d - small) / 32 * (2048 - 32) < 100_000
    assert (large_d - small) / 32 > 4 * (3 + K), "fewer rows than expected: nothing was shown"


# ---- drafts in and out ---------------------------------------------------------------------------------------


def head_and_target(checkpoint, hf, vocabulary=None):
    target = checkpoint.load_model(hf / "target", torch.float32).eval()
    torch.manual_seed(3)
    draft = Draft(target, vocabulary=vocabulary)
    with torch.no_grad():
        for p in draft.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return target, draft


@pytest.mark.parametrize("pruned", [False, True])
def test_exported_head_is_an_eagle3_directory(checkpoint, hf, tmp_path, pruned):
    """Snapshot: keys, shapes, dtypes, fields.  d2t holds offsets.  Loaded back, the logits are identical."""
    from safetensors.torch import load_file

    vocabulary = torch.arange(1, 290, 3) if pruned else None
    target, draft = head_and_target(checkpoint, hf, vocabulary)
    said = checkpoint.export_draft(draft, tmp_path / "out", "scratch", 4)
    assert "--speculative-algorithm EAGLE3" in said and "--speculative-num-draft-tokens 5" in said and '"method": "eagle3"' in said
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "out"]
    Vd, D, I, A = (97 if pruned else 290), 32, 48 // 3, 2 * 16
    tensors = load_file(tmp_path / "out/model.safetensors")
    norms = {f"midlayer.{n}.weight": (D,) for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    shapes = norms | {
        "fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (Vd, D), "d2t": (Vd,), "t2d": (290,),
        "midlayer.self_attn.q_proj.weight": (A, 2 * D), "midlayer.self_attn.k_proj.weight": (A // 2, 2 * D),
        "midlayer.self_attn.v_proj.weight": (A // 2, 2 * D), "midlayer.self_attn.o_proj.weight": (D, A),
        "midlayer.mlp.gate_proj.weight": (I, D), "midlayer.mlp.up_proj.weight": (I, D), "midlayer.mlp.down_proj.weight": (D, I)}
    dtypes = {"d2t": torch.int64, "t2d": torch.bool}
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {n: (s, dtypes.get(n, torch.float32)) for n, s in shapes.items()}
    known = vocabulary if pruned else torch.arange(290)
    assert torch.equal(torch.arange(Vd) + tensors["d2t"], known) and torch.equal(tensors["t2d"].nonzero()[:, 0], known)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw == {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
                   "mlp_bias": False, "rope_scaling": None, "torch_dtype": "float32", "eos_token_id": None, "vocab_size": 290,
                   "draft_vocab_size": Vd, "hidden_size": D, "intermediate_size": I, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
                   "tie_word_embeddings": False, "bos_token_id": 1}
    back = checkpoint.load_draft(tmp_path / "out", target)
    asks = Request([1, 5, 100, 7], 24, 0, 0.8)
    first, second = (generate(target, d, asks, 3)[0] for d in (draft, back))
    assert torch.equal(rl.replay_rounds(draft, first), rl.replay_rounds(back, first)) and torch.equal(first.ids, second.ids)
    assert {n: tuple(t.shape) for n, t in back.state_dict().items()} == {n: tuple(t.shape) for n, t in draft.state_dict().items()}


def test_llama3_rope_survives_the_export(checkpoint, tmp_path):
    """transformers reads the exported fields as it read the target's."""
    transformers = pytest.importorskip("transformers")
    hf_model(tmp_path / "target", "llama 3")
    target = checkpoint.load_model(tmp_path / "target", torch.float32)
    checkpoint.export_draft(Draft(target), tmp_path / "out", "scratch", 4)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    theirs, ours = (transformers.LlamaConfig(**json.loads((tmp_path / x / "config.json").read_text())) for x in ("target", "out"))
    assert theirs.rope_parameters == ours.rope_parameters and raw["rope_scaling"]["rope_type"] == "llama3"
    assert raw["max_position_embeddings"] == 512 and raw["eos_token_id"] == [3, 5]
    assert vars(checkpoint.load_draft(tmp_path / "out", target).config) == vars(Draft(target).config)


WRONG_HEADS = {
    "num_hidden_layers is 2": lambda raw, w: (raw | {"num_hidden_layers": 2}, w),
    "the draft's vocabulary is 17": lambda raw, w: (raw | {"vocab_size": 17}, w),
    "target_hidden_size is 64": lambda raw, w: (raw | {"target_hidden_size": 64}, w),
    "layers read": lambda raw, w: (raw | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}}, w),
    "norm_before_residual": lambda raw, w: (raw | {"norm_before_residual": True}, w),
    "ascending ids": lambda raw, w: (raw, w | {"d2t": w["d2t"].flip(0)}),
    "ascending ids in": lambda raw, w: (raw, w | {"d2t": w["d2t"] + 2}),
    "do not name the same": lambda raw, w: (raw, w | {"t2d": ~w["t2d"]}),
    "having biases": lambda raw, w: (raw, w | {"midlayer.self_attn.q_proj.bias": torch.zeros(64)}),
    "missing": lambda raw, w: (raw, {n: t for n, t in w.items() if n != "fc.weight"}),
    "lm_head.weight has shape": lambda raw, w: (raw, w | {"lm_head.weight": w["lm_head.weight"][:50].clone()}),
    "embed_tokens.weight has shape": lambda raw, w: (raw, w | {"embed_tokens.weight": torch.zeros(290, 16)}),
}


def test_a_head_of_other_sizes_keeps_them(checkpoint, hf, tmp_path):
    """Loaded from its directory and again from what --save kept of it; a head of this project has only its widths of its own."""
    target = checkpoint.load_model(hf / "target", torch.float32)
    other = Draft(target, replace(Draft(target).config, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, rope_theta=7e3))
    checkpoint.export_draft(other, tmp_path / "out", "scratch", 4)
    serve_checkpoint(hf, "--draft", tmp_path / "out", "--save", tmp_path / "kept", "--no-learn")
    back, _ = aurora.find_draft(str(tmp_path / "kept"), target)
    assert back.config == other.config and all(torch.equal(a, b) for a, b in zip(back.parameters(), other.parameters()))
    save(tmp_path / "d.pt", other.config, other.state_dict(), {})
    with pytest.raises(UserError, match="they differ in rope_theta"):
        aurora.find_draft(str(tmp_path / "d.pt"), target)


@pytest.mark.parametrize("message", WRONG_HEADS)
def test_heads_of_another_make_are_refused(checkpoint, hf, tmp_path, message):
    from safetensors.torch import load_file, save_file

    target, draft = head_and_target(checkpoint, hf, torch.arange(1, 290, 3))
    checkpoint.export_draft(draft, tmp_path / "out", "scratch", 4)
    raw, weights = WRONG_HEADS[message](json.loads((tmp_path / "out/config.json").read_text()), load_file(tmp_path / "out/model.safetensors"))
    (tmp_path / "out/config.json").write_text(json.dumps(raw))
    save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match=message):
        checkpoint.load_draft(tmp_path / "out", target)


def test_the_embedding_is_the_targets_memory_unless_a_head_brings_its_own(checkpoint, hf, tmp_path):
    from safetensors.torch import load_file, save_file

    target, draft = head_and_target(checkpoint, hf)
    weight = target.model.embed_tokens.weight
    assert draft.embed_tokens.weight.data_ptr() == weight.data_ptr() and not draft.embed_tokens.weight.requires_grad
    before = weight.clone()
    checkpoint.export_draft(draft, tmp_path / "out", "scratch", 4)
    tensors = load_file(tmp_path / "out/model.safetensors")
    for embedding, shared in ((weight.detach().clone(), True), (weight.detach() + 1, False)):
        save_file(tensors | {"embed_tokens.weight": embedding}, tmp_path / "out/model.safetensors")
        back = checkpoint.load_draft(tmp_path / "out", target)
        assert torch.equal(back.embed_tokens.weight, embedding) and torch.equal(weight, before), "the target was written over"
        assert (back.embed_tokens.weight.data_ptr() == weight.data_ptr()) == shared and not back.embed_tokens.weight.requires_grad
    checkpoint.export_draft(back, tmp_path / "again", "scratch", 4)
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["embed_tokens.weight"], weight + 1)


def test_exported_small_model_assists_in_transformers(checkpoint, hf, tmp_path):
    """What was learned is what they load: same logits; and generate(assistant_model=...) says what generate says."""
    transformers = pytest.importorskip("transformers")
    target = checkpoint.load_model(hf / "target", torch.float32)
    small = checkpoint.load_draft(hf / "small", target)
    with torch.no_grad():
        small.lm_head.weight.add_(0.1)
    said = checkpoint.export_draft(small, tmp_path / "out", hf / "small", 4)
    assert "STANDALONE" in said and '"method": "draft_model"' in said and (tmp_path / "out/tokenizer.json").exists()
    ids = torch.randint(3, 290, (1, 40), generator=torch.Generator().manual_seed(0))
    theirs, assistant = (transformers.AutoModelForCausalLM.from_pretrained(x) for x in (hf / "target", tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(assistant(ids).logits, small.logits(small(ids)[0]), atol=1e-4, rtol=0)
    answers = [theirs.generate(ids, max_new_tokens=12, do_sample=False, **more) for more in ({}, {"assistant_model": assistant})]
    assert torch.equal(*answers)


@pytest.mark.parametrize("variant", [{}, dict(attention_bias=True, tie_word_embeddings=True), dict(qk_norm=True)])
def test_our_checkpoints_in_hugging_face_layout(checkpoint, tmp_path, variant):
    """The embedded kind of target, and the other families: same logits in transformers, but for the suppressed ids."""
    transformers = pytest.importorskip("transformers")
    target = tiny_target(**variant)
    save(tmp_path / "t.pt", target.config, target.state_dict(), {})
    checkpoint.main([f"{tmp_path}/t.pt", "--out", f"{tmp_path}/out"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 16, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[..., :16], target.logits(target(ids)[0])[..., :16], atol=1e-4, rtol=0)
    back = checkpoint.load_model(tmp_path / "out", torch.float32)
    assert vars(back.config) == vars(target.config) and torch.equal(back.logits(back(ids)[0]), target.logits(target(ids)[0]))
    assert theirs.generation_config.suppress_tokens == [16] and theirs.config.model_type == {0: "llama", 2: "qwen2", 1: "qwen3"}[len(variant)]
    with pytest.raises(UserError, match="exists"):
        checkpoint.main([f"{tmp_path}/t.pt", "--out", f"{tmp_path}/out"])


def test_the_embedded_target_in_hugging_face_layout(checkpoint, tmp_path, capsys):
    """The shipped weights, exported: transformers' logits on text, and aurora.py's own answer, token for token."""
    transformers = pytest.importorskip("transformers")
    checkpoint.main([f"{HERE}/weights/target.pt", "--out", f"{tmp_path}/out"])
    target, _ = model.load_target(HERE / "weights/target.pt")
    ids = torch.tensor([[256, *b"class Stack:\n    def push(self, item):\n        self.items.append(item)\n"]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[..., :256], target.logits(target(ids)[0])[..., :256], atol=1e-4, rtol=0)
    answers = []
    for name in (HERE / "weights/target.pt", tmp_path / "out"):
        aurora.main(["--target", str(name), "--draft", "ngram", "--prompt", "def main():", "--max-new-tokens", "16",
                     "--num-speculative-tokens", "4"])  # in auto, the clock has a say
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 8


# ---- the driver on real checkpoints --------------------------------------------------------------------------


def serve_checkpoint(hf, *more):
    aurora.main(["--target", f"{hf}/target", "--prompts", f"{hf}/prompts.txt", "--max-new-tokens", "10",
                 "--num-speculative-tokens", "4", "--learn-every", "0", *map(str, more)])


def test_driver_serves_saves_resumes_and_exports_a_pruned_head(checkpoint, hf, tmp_path, capsys):
    """The pruning is fixed at creation: the lowest ids and the end tokens; a resumed run keeps it, so does an export."""
    edit(hf / "target/config.json", eos_token_id=280)
    try:
        serve_checkpoint(hf, "--draft-vocab", 50, "--save", tmp_path / "kept", "--no-gate", "--top-p", 0.9, "--top-k", 40)
        serve_checkpoint(hf, "--draft", tmp_path / "kept", "--save", tmp_path / "kept", "--no-gate", "--export", tmp_path / "out")
        assert "50 of 290 ids" in (said := capsys.readouterr().out) and "top-p 0.9, top-k 40" in said and f"exported to {tmp_path}/out" in said
        serve_checkpoint(hf, "--draft", tmp_path / "out", "--save", tmp_path / "again", "--no-gate", "--num-speculative-tokens", 2)
        serve_checkpoint(hf, "--draft", tmp_path / "again", "--no-learn", "--dtype", "bfloat16")
    finally:
        edit(hf / "target/config.json", eos_token_id=None)
    last, other = (torch.load(tmp_path / x / "draft.pt", weights_only=True)["weights"] for x in ("kept/v000008", "again/v000004"))
    assert last["vocabulary"].tolist() == other["vocabulary"].tolist() == [*range(49), 280]
    assert not torch.equal(last["fc.weight"], other["fc.weight"]) and checkpoint.read_tensors(tmp_path / "out")["fc.weight"].equal(last["fc.weight"])


def test_driver_serves_a_small_model_and_prompt_lookup(checkpoint, hf, tmp_path, capsys):
    serve_checkpoint(hf, "--draft", hf / "small", "--save", tmp_path / "kept", "--no-gate", "--export", tmp_path / "out", "--compare", "--static", "ngram")
    serve_checkpoint(hf, "--draft", tmp_path / "kept", "--no-learn", "--compare", "--static", hf / "small")
    kept = torch.load(tmp_path / "kept/v000004/draft.pt", weights_only=True)["weights"]
    out, given = checkpoint.read_tensors(tmp_path / "out"), checkpoint.read_tensors(hf / "small")
    assert all(torch.equal(out[n], kept[n]) for n in kept) and not torch.equal(out["model.norm.weight"], given["model.norm.weight"])
    serve_checkpoint(hf, "--draft", "ngram", "--log", tmp_path / "log")
    lines = [json.loads(x) for x in (tmp_path / "log").read_text().splitlines() if '"online"' in x]
    assert all(x["accepted"] <= x["drafted"] <= 4 * x["rounds"] for x in lines) and any(x["plain_rounds"] for x in lines)
    assert "prompt lookup" in capsys.readouterr().out
    aurora.main(["--target", f"{hf}/target", "--draft", "ngram", "--prompt", "the quick <s> brown fox", "--max-new-tokens", "9"])
    captured = capsys.readouterr()
    assert "9 tokens" in captured.err and captured.out


@pytest.mark.parametrize("draft, arms", [("ngram", 4), ("small", 4), ("head", 3)])
def test_bench_runs_and_all_arms_say_the_same(checkpoint, hf, tmp_path, capsys, draft, arms):
    if draft == "head":  # transformers has no such draft
        checkpoint.export_draft(head_and_target(checkpoint, hf)[1], tmp_path / "head", "scratch", 4)
    name = {"ngram": "ngram", "small": hf / "small", "head": tmp_path / "head"}[draft]
    checkpoint.main([f"{hf}/target", "--bench", "--draft", str(name), "--prompts", f"{hf}/prompts.txt", "--turns", "2", "--max-new-tokens", "7"])
    said = capsys.readouterr().out
    assert "answers differ in 0 turns" in said and said.count("tokens/s ") == arms and said.count(" / ") == {4: 5, 3: 3}[arms]


BAD_CHECKPOINTS = {
    "7 layers|4 layers": ["--target", "SHALLOW"],
    "the draft's vocabulary is 211, the target's 290": ["--draft", "SHALLOW"],
    "vocabulary is 257, the target's 290": ["--draft", "static"],
    "must be of one kind": ["--draft", "SMALL", "--compare", "--static", "HEAD"],
    "only 1 token": ["--prompt", "the", "--draft", "ngram"],
    "nothing to --save": ["--draft", "ngram", "--save", "NEW"],
    "not there yet": ["--export", "SMALL"],
    "top-p must": ["--top-p", "0"],
    "top-k must": ["--top-k", "-1"],
    "says only 290 ids": ["--draft-vocab", "291"],
    "goes with --draft scratch": ["--draft-vocab", "29", "--draft", "ngram"],
    "goes with none of": ["--prompt", "x", "--export", "NEW"],
    "cannot read .*config.json": ["--target", "FOLDER"],
    "context of 64": ["--draft", "SHORT", "--max-new-tokens", "60"],
}


@pytest.mark.parametrize("message", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_clear_line(checkpoint, hf, tmp_path, message):
    hf_model(tmp_path / "shallow", layers=4)
    bpe(tmp_path / "shallow")
    if "HEAD" in BAD_CHECKPOINTS[message]:
        checkpoint.export_draft(head_and_target(checkpoint, hf)[1], tmp_path / "head", "scratch", 4)
    if "only 1" in message:
        inner = json.loads((hf / "target/tokenizer.json").read_text())
        edit(hf / "target/tokenizer.json", post_processor=None)
    hf_model(tmp_path / "short", "llama", layers=2, vocab_size=290, max_position_embeddings=64)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.safetensors").write_bytes((hf / "small/model.safetensors").read_bytes())
    names = {"SMALL": hf / "small", **{n: tmp_path / n.lower() for n in ("SHALLOW", "HEAD", "NEW", "FOLDER", "SHORT")}}
    try:
        with pytest.raises(UserError, match=message) as error:
            prompts = [] if "--prompt" in BAD_CHECKPOINTS[message] else ["--prompts", f"{hf}/prompts.txt"]
            aurora.main(["--target", f"{hf}/target", *prompts, *(str(names.get(a, a)) for a in BAD_CHECKPOINTS[message])])
        assert "\n" not in str(error.value)
    finally:
        if "only 1" in message:
            (hf / "target/tokenizer.json").write_text(json.dumps(inner))


# ---- the fast path and the profile: serve.py ---------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """A target, a draft that learns and two that never do, these in bfloat16, compiled; and the same four as they were."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {error}")
    def make():
        target = tiny_target(gain=2.0, num_hidden_layers=7, max_position_embeddings=248)
        return target, tiny_draft(target, 1), tiny_draft(target, 2).bfloat16(), tiny_draft(target, 3).bfloat16()

    models, eager = make(), make()
    logging.getLogger("torch.__trace").disabled = True  # what torch writes there costs pytest minutes
    packed_first = [*models[2:], models[1]]  # if graphs were shared, those of the others would serve the one that learns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "ROWS", (9,))  # a graph takes seconds to make
        serve.compile_forwards(models[0], packed_first, serve.slots_for(200), models[1])
    return models, eager


def test_compiled_rounds_say_what_eager_rounds_say(compiled):
    """Greedy: token by token, rounds of every length, until the first near-tie; sampled: with the same coins the same
    tokens but where a coin lies on a boundary, so nearly all; and replay reproduces what the compiled draft served."""
    for seed, temperature in ((0, 0.0), (1, 0.0), (2, 0.9), (3, 0.7)):
        r = request(seed=seed, temperature=temperature, new=60)
        traces = []
        for models in compiled:
            run = Generation(models[0], models[1], [r], 8)
            list(serve.decode(run, Changing(4, 0, 1, 3, 8, 0, 0, 2)))
            traces.append(run.trace(0))
        fast, plain = traces
        a, b = fast.ids.tolist(), plain.ids.tolist()
        first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if temperature == 0 and first is not None:
            top = answer_logits(plain)[first - plain.prompt_length].topk(2).values
            assert top[0] - top[1] < 1e-4
        if temperature > 0:
            assert first is None
            replayed = rl.replay_rounds(compiled[1][1], fast)
            log_q = (replayed / temperature).log_softmax(-1).gather(-1, fast.draft_tokens.clamp(min=0)[..., None]).squeeze(-1)
            real = fast.draft_tokens >= 0
            torch.testing.assert_close(log_q[real], fast.behaviour_logprobs[real], atol=1e-5, rtol=0)


def test_compiled_forwards_pad_their_tokens_up_to_the_end_of_the_context(compiled):
    """Each number of tokens, and a batch, which is not compiled, up to the last positions that the model knows."""
    (target, *_), (eager, *_) = compiled
    slots = serve.slots_for(200)
    with torch.no_grad():
        for T, B in ((1, 1), (2, 1), (5, 1), (6, 1), (9, 1), (10, 1), (3, 2)):
            ids = torch.randint(0, 16, (B, 40 + T), generator=torch.Generator().manual_seed(T))
            positions = slots - model.SPARE - 40 - T + torch.arange(40 + T).expand(B, -1)
            results = []
            for m in (target, eager):
                cache = m.new_cache(B, slots - model.SPARE)
                m(ids[:, :40], positions[:, :40], cache)
                results.append(m.verify(ids[:, 40:], positions[:, 40:], cache))
            for x, y in zip(*results):
                finite = y.isfinite()
                assert x.shape == y.shape and torch.equal(x.isfinite(), finite)
                assert (x - y)[finite].abs().max() < 1e-5 * y[finite].abs().max()
        assert target.new_cache(1, slots - model.SPARE).k[0].shape[1] == slots


def test_what_is_published_serves_at_once(compiled):
    """Weights that a graph had packed would go stale: the compiled draft must say what its new weights say.  And graphs with
    packed weights must not serve another model of the same class, which torch would let them."""
    (target, served, *fixed), (eager, _, other, third) = compiled
    old = {name: tensor.clone() for name, tensor in served.state_dict().items()}
    r = request(temperature=0.8, new=30)

    def logits_of(target, draft):
        run, seen, propose = Generation(target, draft, [r], 4), [], draft.propose
        draft.propose = lambda *a: (proposed := propose(*a), seen.append(proposed[1]))[0]
        run.round(), run.round(3)
        del draft.propose
        return seen[0]

    stale = logits_of(target, served)
    newer = tiny_draft(eager, 4)
    served.load_state_dict(newer.state_dict())
    fresh, expected = logits_of(target, served), logits_of(eager, newer)
    served.load_state_dict(old)
    finite = expected.isfinite()
    for packed, unpacked in zip(fixed, (other, third)):
        assert (logits_of(target, packed) - logits_of(eager, unpacked))[finite].abs().max() < 0.05
    assert (fresh - expected)[finite].abs().max() < 1e-4 and (stale - expected)[finite].abs().max() > 0.1


@pytest.mark.parametrize("cuts", [False, True])
def test_a_compiled_draft_draws_from_the_logits_that_it_returns(compiled, cuts, monkeypatch):
    """In bfloat16 a graph may compute one thing and write down another, rounded; acceptance is lossless only if the token
    was drawn from what is written down.  Of a draft that never learns, and of one that does, whose products of one row are
    loops; requests with cuts get theirs from graphs that were made without, and with."""
    target, packed = compiled[0][0], compiled[0][3]
    learning, loops, one_row = tiny_draft(target, 4).bfloat16(), [], serve.one_row
    monkeypatch.setattr(serve, "ROWS", (9,))
    monkeypatch.setattr(serve, "one_row", lambda x, weight: (loops.append(len(x)), one_row(x, weight))[1])
    with torch._functorch.config.patch(enable_autograd_cache=False):  # a graph that torch kept would not be made again
        serve.compile_forwards(target, [learning], serve.slots_for(200), learning, cuts=cuts)
    assert loops.count(1) > 8
    ids, positions, last = torch.randint(0, 16, (1, 5)), torch.arange(5)[None], torch.tensor([4])
    for draft, law in itertools.product((learning, packed), ((0.8, 1.0, 0), (0.0, 1.0, 0), (0.8, 0.6, 0), (1.3, 0.9, 5))):
        sampling = verify.Sampling([law])
        for _ in range(20):
            features, coins = torch.randn(1, 5, draft.fc.in_features), torch.rand(1, 8, dtype=torch.float64)
            tokens, logits, logprobs = draft.propose(features, ids, positions, last, coins, sampling, draft.new_cache(1, 50))
            p = verify.probabilities(logits, sampling.temperature[:, None])
            assert torch.equal(tokens, verify.inverse_cdf(p, coins))
            torch.testing.assert_close(p.gather(-1, tokens[..., None])[..., 0].log().float(), logprobs)
            assert law[0] == 0 or law[1] == 1 or logits[..., :16].isinf().any()


@pytest.mark.parametrize("name", ["head", "pruned head", "small model"])
def test_tokens_go_through_the_smallest_graph_that_fits(checkpoint, hf, name, monkeypatch):
    """With graphs that only count: which ones run, and that padded they say what the models say."""
    target = checkpoint.load_model(hf / "target", torch.float32).eval()
    draft = drafts_for(target, hf)[name]
    asking(target, draft)
    ran, r = [], Request([3, 5, 100, 7], 60, 0, 0.8)
    expected = generate(target, draft, r, FixedLength(4))[0]

    def counting(method, **_):
        def graph(*args):
            ran.append((method.__name__, args[[isinstance(x, model.Cache) for x in args].index(True) - 1].shape[1]))
            return method(*args)

        return graph

    monkeypatch.setattr(torch, "compile", counting)
    serve.compile_forwards(target, [draft], 256, draft)
    assert {(n, rows) for n, rows in ran if n != "verify"} == {("begin", 9), ("begin", 5), ("go_on", 1)}
    ran.clear()
    with torch.no_grad():
        cache = target.new_cache(1, 200)
        for T in (1, 2, 5, 6, 9, 10):
            target.verify(torch.ones(1, T, dtype=torch.int64), torch.arange(T)[None], cache)
    assert [rows for _, rows in ran] == [1, 5, 5, 9, 9]
    ran.clear()
    assert torch.equal(generate(target, draft, r, FixedLength(4))[0].ids, expected.ids)
    assert ran.count(("begin", 5)) == ran.count(("verify", 5)) > 12 and ran.count(("go_on", 1)) == 3 * len(expected.starts)
    ran.clear()
    generate(target, draft, Request(r.prompt, 250, 0, 0.8), FixedLength(4))  # more than the graphs' caches hold
    assert not ran


def test_where_torch_cannot_compile_nothing_is_changed(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: refuse)
    target = tiny_target()
    draft = tiny_draft(target)
    before = generate(target, draft, request(), 3)[0].ids
    with pytest.raises(UserError, match=r"cannot compile here \(no compiler\); leave it out$"):
        serve.compile_forwards(target, [draft], 256)
    assert not {"verify", "begin", "go_on", "new_cache"} & (vars(target).keys() | vars(draft).keys())
    assert torch.equal(generate(target, draft, request(), 3)[0].ids, before)


def test_bfloat16_differs_at_near_ties_only(monkeypatch, gap=0.35):
    """What a compiled bfloat16 target says greedily lies, for the same weights in float32, close to the best."""
    if not aurora.fast_bfloat16():
        pytest.skip("this processor has neither AVX512-BF16 nor AMX")
    monkeypatch.setattr(serve, "ROWS", (1,))
    logging.getLogger("torch.__trace").disabled = True
    target = tiny_target(num_hidden_layers=2, dtype=torch.bfloat16)
    exact = tiny_target(num_hidden_layers=2)
    exact.load_state_dict(target.state_dict())
    serve.compile_forwards(target, [], 256)
    trace, _ = generate(target, None, request(temperature=0.0, new=80), 0)
    log_p = exact.logits(exact(trace.ids[None])[0])[0, trace.prompt_length - 1 : -1].log_softmax(-1)
    said = log_p.gather(-1, trace.ids[trace.prompt_length :, None]).squeeze(-1)
    assert (log_p.amax(-1) - said).max() < gap


@pytest.mark.parametrize("name", ["head", "ngram"])
def test_the_profile_adds_up_and_leaves_no_trace(name, monkeypatch, capsys):
    """Every round drafts as many tokens as it is timed for, also by a prompt lookup that would find none, and on a target all of
    whose tokens would end an answer."""
    from draft import NGram

    target, round = tiny_target(max_position_embeddings=256, eos_token_ids=tuple(range(17))), Generation.round
    draft = NGram(target.config) if name == "ngram" else tiny_draft(target)
    asking(target, draft)
    monkeypatch.setattr(NGram, "lookup", lambda self, text, K: torch.full((K,), -1))

    def drafting(self, K):
        output = round(self, K)
        assert self.drafted == [K]
        return output

    monkeypatch.setattr(Generation, "round", drafting)
    rounds = serve.profile(target, draft, 40)
    assert rounds[0][1] == 0 and all(len(parts) == len(serve.PARTS) and min(parts) > 0 for K, parts in rounds.items() if K)
    assert not {"verify", "propose", "lookup"} & (vars(target).keys() | vars(draft).keys()) and serve.accept is accept
    assert target.config.eos_token_ids == tuple(range(17))
    serve.print_profile(target, draft, target.config.max_position_embeddings, False)
    lines = capsys.readouterr().out.splitlines()
    shares = [[int(x) for x in re.findall(r"(\d+)%", line)] for line in lines if line[:1].isdigit()]
    assert len(shares) >= 5 and all(98 <= sum(row) <= 102 for row in shares), lines


def test_a_sweep_serves_every_length_in_turn_and_compares_what_is_found_with_the_best(monkeypatch, capsys):
    """Plain decoding takes 2 seconds a request of ten tokens, K = 4 takes 1, other lengths 1.5; auto takes 1.25 on "a", 1 on "b"."""
    order, auto = [], DraftLength([1.0] * 9)

    def clock(target, draft, request, rule):
        order.append("auto" if rule is auto else rule.longest)
        taken = {"auto": 1.25 if request.kind == "a" else 1.0, 0: 2.0, 4: 1.0}.get(order[-1], 1.5)
        return SimpleNamespace(ids=[0] * (17 + rule.longest // 4), prompt_length=7, draft_tokens=torch.tensor([[3, 3, -1], [3, -1, -1]])), taken

    monkeypatch.setattr(serve, "generate", clock)
    serve.print_sweep(None, None, [serve.Request([0] * 7, 10, 0, 0.0, kind) for kind in "ab"], auto)
    assert [sorted(map(str, order[i : i + 10])) for i in (0, 10)] == [sorted([*map(str, range(9)), "auto"])] * 2 and order[0] != order[10]
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:11]}
    assert table["0"] == [1.0, 1.0, 1.0, 5.0] and table["4"] == [2.0, 2.0, 2.0, 10.0] and table["7"][:3] == [1.33] * 3
    assert table["auto"] == [1.6, 2.0, 1.78, 8.9]
    assert lines[-1] == "auto, 1.5 drafted tokens a round, over the best fixed K: a 0.80 (K = 4), b 1.00 (K = 4), all 0.89 (K = 4)"


def test_an_interrupted_sweep_shows_the_requests_that_every_length_has_served(monkeypatch, capsys):
    left = iter(range(15))  # half of the second request

    def clock(target, draft, request, rule):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return SimpleNamespace(ids=[0] * 17, prompt_length=7, draft_tokens=torch.tensor([[3]])), 2.0 if request.kind == "a" else 9.0

    monkeypatch.setattr(serve, "generate", clock)
    requests = [serve.Request([0] * 7, 10, 0, 0.0, kind) for kind in "ab"]
    serve.print_sweep(None, None, requests, DraftLength([1.0] * 9))
    said = capsys.readouterr()
    assert "interrupted" in said.err and said.out.split()[:4] == ["K", "a", "all", "tokens/s"] and said.out.splitlines()[1].split() == ["0", "1.00", "1.00", "5.0"]
    with pytest.raises(KeyboardInterrupt):  # nothing to show
        serve.print_sweep(None, None, requests, DraftLength([1.0] * 9))


def test_a_sweep_on_the_command_line(files, capsys):
    aurora.main(["--target", f"{files}/target.pt", "--draft", f"{files}/draft.pt", "--prompts", f"{files}/prompts.jsonl", "--max-new-tokens", "12",
                 "--sweep", "--temperature", "0"])
    out = capsys.readouterr().out
    assert "learner  off" in out and re.search(r"over the best fixed K: .*all \d\.\d\d \(K = \d\)\n$", out)
