"""Rounds that the kernel decides, and how far from accept_torch it may be.

The two compute the same in different precision, so they may differ only where a coin lies within
rounding of a boundary; `misplaced` measures how far a coin would have to move, in probability.
Letters: B batch rows, K drafted tokens, V vocabulary, T temperature.
"""

from pathlib import Path

import pytest
import torch

from support.sampling import inverse_cdf, probabilities
from support.accept_torch import accept_torch

HOME = Path(__file__).parent.parent
RULES = [pytest.param(True, id="block"), pytest.param(False, id="token")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 31, 256, 257, 1000, 4097, 32000, 50257, 151936]
NAN, INF = float("nan"), float("inf")
BELOW_ONE = 1 - 2**-53  # the largest coin
ROUNDING = 3e-7  # of a probability made of float32 exponentials; a w is a product of K quotients


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_round(V, dtype=torch.float32, B=6, K=3, seed=0, noise=1.0):
    """A batch with a bit of everything: rows at their own temperature, greedy ones too, drafts of
    K, K-1 or K-2 tokens, impossible ids, a draft that is `noise` away from the target, and coins
    that are 0 or as close to 1 as they get.  -> what accept_torch takes, without the rule."""
    g = torch.Generator().manual_seed(1000 * seed + V)
    target = 3 * torch.randn(B, K + 1, V, generator=g)
    draft = target[:, :K] + noise * torch.randn(B, K, V, generator=g)
    for logits in (target, draft):
        logits.masked_fill_(torch.rand(logits.shape, generator=g) < 0.1, -INF)
        logits[..., V // 2] = 1.0  # no row without a possible id
    target, draft = target.to(dtype), draft.to(dtype)
    row, place = torch.arange(B), torch.arange(K)
    temperature = torch.tensor([1.0, 0.0, 0.3, 1.7, 0.8, 1.0])[row % 6].double()
    coins = torch.rand(B, 2 * K + 1, dtype=torch.float64, generator=g)
    tokens = inverse_cdf(probabilities(draft, temperature[:, None]), coins[:, K + 1 :])
    tokens[place >= K - row[:, None] % 3] = -1
    coins = coins[:, : K + 1].contiguous()
    coins[torch.rand(coins.shape, generator=g) < 0.1] = 0.0
    coins[torch.rand(coins.shape, generator=g) < 0.1] = BELOW_ONE
    return target, draft, tokens, coins, temperature


def proposed_outright(case):
    """The same round from a draft without logits."""
    target, _, *rest = case
    return target, None, *rest


def misplaced(case, block, kept, token):
    """How far row by row (B,) the coins would have to move, in probability, for the definition in
    float64 to decide as was decided: 0 where it does, 1 for an impossible token."""
    target, draft, tokens, coins, temperature = case
    distance = []
    for b in range(len(tokens)):
        K = int((tokens[b] >= 0).sum())
        target_p = probabilities(target[b, : K + 1], temperature[b])
        draft_q = torch.nn.functional.one_hot(tokens[b, :K], target.shape[-1]).double()
        if draft is not None and temperature[b] > 0:
            draft_q = probabilities(draft[b, :K], temperature[b])
        row = target_p, draft_q, tokens[b, :K].tolist(), coins[b].tolist()
        n, v = int(kept[b]), int(token[b])
        excess, mass = (block_excess if block else token_excess)(*row, n)
        cumulative, coin = mass.cumsum(0), coins[b, -1] * mass.sum()
        before, after = (cumulative[v] - mass[v]).item(), cumulative[v].item()
        outside = max(before - coin.item(), coin.item() - after) if mass[v] > 0 else 1.0
        distance.append(max(0.0, outside, excess))
    return torch.tensor(distance, dtype=torch.float64)


def residual(target_p, draft_q, w, n):
    """What the next token after n of the row's tokens is drawn from (V,)."""
    if n == len(draft_q):
        return target_p[n]
    rest = (w * target_p[n] - draft_q[n]).clamp(min=0)
    return rest if rest.sum() > 0 else target_p[n]


def token_excess(target_p, draft_q, tokens, coins, n):
    """By how much a coin of the token rule is on the wrong side if n are kept; and the residual."""
    wrong = [0.0]
    for k, x in enumerate(tokens[: n + 1]):
        left = target_p[k, x].item() - coins[k] * draft_q[k, x].item()  # kept if positive
        wrong.append(-left if k < n else left)
    return max(wrong), residual(target_p, draft_q, 1.0, n)


def block_excess(target_p, draft_q, tokens, coins, n):
    """The same for the block rule."""
    K, w = len(tokens), [1.0]
    for k, x in enumerate(tokens):
        w.append(min(1.0, w[-1] * target_p[k, x].item() / max(draft_q[k, x].item(), 1e-300)))
    wrong = [0.0]
    for i in range(max(1, n), K + 1):
        if i == K:
            left = w[K] - coins[K - 1]  # kept if positive
        else:
            m = (w[i] * target_p[i] - draft_q[i]).clamp(min=0).sum().item()
            left = m - coins[i - 1] * (m + (1 - w[i]))
        wrong.append(-left if i == n else left)
    return max(wrong), residual(target_p, draft_q, w[n], n)


def assert_decided(decide, case, block):
    """`decide` says what accept_torch says, or a coin was within rounding of a boundary: rarely."""
    kept, token, status = decide(*case, block)
    expected = accept_torch(*case, block)
    assert torch.equal(status, expected[2])
    same = (kept == expected[0]) & (token == expected[1])
    moved = misplaced(case, block, kept, token)
    room = ROUNDING * (case[2].shape[1] if block else 1)
    assert (moved[same] < 1e-12).all(), "the measure itself"
    assert (moved < room).all(), f"coins would have to move by {moved.tolist()}"
    assert (~same).sum() <= 1 + len(same) // 50


def assert_same(decision, other):
    for x, y in zip(decision, other, strict=True):
        assert torch.equal(x, y)
