"""The acceptance rules of speculative decoding: how many drafted tokens to keep, and the next one.

A language model, the *target*, pays one forward pass for a token, but in one pass it can judge
several places of a text.  So a cheap model, the *draft*, guesses a *chain* of K tokens x_1..x_K,
each x_i drawn from its distribution draft_q_i; the target reads them all and says its own,
target_p_i, at each of those places and at the one after; and a rule keeps the first few and adds
one more token.  What comes out must have the target's distribution, whatever the draft was: the
rule is *lossless*.  It decides by *coins*, numbers drawn uniformly from [0, 1).

The *token rule* (Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318, theorem 1) goes
from left to right: keep x_i with probability min(1, target_p_i(x_i) / draft_q_i(x_i)) and stop at
the first that is not kept.  There, draw the next token from the *residual*, max(0, target_p -
draft_q) renormalised; if all were kept, draw it from target_p_{K+1}, a bonus.  It is lossless:
token v comes out with probability

    draft_q(v) min(1, target_p(v) / draft_q(v)) + (1 - overlap) residual(v)
    = min(target_p, draft_q)(v) + max(0, target_p - draft_q)(v) = target_p(v),

where overlap = sum_v min(target_p, draft_q)(v) is how often a drafted token is kept.

For example, of two tokens, draft_q = (0.9, 0.1) and target_p = (0.6, 0.4).  The first is drafted
nine times in ten and kept with probability 0.6 / 0.9, so it comes out with 0.6.  The 0.3 that were
rejected go to the residual, the second token alone; that one is drafted with 0.1 and always kept,
so it comes out with 0.1 + 0.3 = 0.4.

The *block rule* (Sun et al. 2403.10444; the best that one chain allows, 2602.16961) judges the
chain as a whole: a token that the draft underrates makes up for one that it overrates.

    w_0 = 1,   w_i = min(1, w_{i-1} target_p_i(x_i) / draft_q_i(x_i)),
    m_i = sum_v max(0, w_i target_p_{i+1}(v) - draft_q_{i+1}(v)),
    h_i = m_i / (m_i + 1 - w_i) for i < K,   h_K = w_K.

Keep x_1..x_n for the largest n with coin_n < h_n, none if there is none; then draw the next token
from max(0, w_n target_p_{n+1} - draft_q_{n+1}), renormalised, or from target_p_{K+1} if n = K.  A
drafted prefix is kept with probability w_i, by induction from the end: given that P(n >= i+1 |
x_1..x_{i+1}) = w_{i+1}, and with sum_v min(draft_q_{i+1}, w_i target_p_{i+1})(v) = w_i - m_i,

    P(n >= i | x_1..x_i) = (w_i - m_i) + (1 - w_i + m_i) h_i = w_i.

The token rule keeps it with the product of min(1, target_p / draft_q), which is never more.  The
proof looks only ahead from i, so K may depend on the tokens drafted so far: on an end token, or on
how sure the draft is.  docs/block.md has the whole proof and an example of two tokens.

    python verify.py        one round in slow motion, under both rules

`accept_one` is the definition; what runs is kernels.cu or, where it cannot, support/accept_torch.py
(AURORA_KERNEL=torch|fused forces one).  Nothing here knows about models, and randomness is an
argument: the same coins give the same tokens.

Letters: B batch rows, K drafted tokens a round, V vocabulary.
"""

import torch

from support.accept_torch import accept_torch
from support.build import kernel
from support.sampling import inverse_cdf

RULES = ("block", "token")


def accept_one(target_p, draft_q, tokens, coins, rule="block"):
    """One row.  target_p (K+1, V), draft_q (K, V), tokens (K,) ids, coins (K+1,) in [0, 1): one for
    every token, and the last one draws.  Floats are float64.  -> (kept, next token)"""
    keep = keep_block if rule == "block" else keep_tokens
    n, w = keep(target_p, draft_q, tokens, coins)
    mass = target_p[n]
    if n < len(tokens):
        mass = (w * target_p[n] - draft_q[n]).clamp(min=0)
        if mass.sum() == 0:  # target_p = draft_q, up to rounding
            mass = target_p[n]
    return n, int(inverse_cdf(mass, coins[-1]))


# Below, row i of target_p and draft_q is about x_{i+1}, and so is coins[i].  Comparisons are
# strict, so that a coin of 0 keeps nothing impossible.


def keep_tokens(target_p, draft_q, tokens, coins):
    """-> (n, 1): how many are kept, and the weight of target_p in the residual."""
    n = 0
    while n < len(tokens) and coins[n] * draft_q[n, tokens[n]] < target_p[n, tokens[n]]:
        n += 1
    return n, 1.0


def keep_block(target_p, draft_q, tokens, coins):
    """-> (n, w_n)"""
    K, n, w = len(tokens), 0, [1.0]
    for p, q, x in zip(target_p, draft_q, tokens):
        w.append(min(1.0, w[-1] * float(p[x]) / max(float(q[x]), 1e-300)))
    for i in range(1, K):
        m = (w[i] * target_p[i] - draft_q[i]).clamp(min=0).sum()
        if coins[i - 1] * (m + (1 - w[i])) < m:  # coin_i < h_i
            n = i
    if K and coins[K - 1] < w[K]:
        n = K
    return n, w[n]


REASONS = (  # kernels.cu: Status
    None,
    "coins must lie in [0, 1)",
    "draft_tokens must be -1 (pad) or ids in 0..V-1, with pads at the end",
    "temperature must be 0 (greedy) or positive",
    "logits without a distribution (NaN, +inf or all -inf) in a row that acceptance reads",
)


class NoDistribution(ValueError):
    """Logits that acceptance reads are NaN, +inf or nothing but -inf."""


def accept(target_logits, draft_logits, draft_tokens, coins, temperature=1.0, rule="block"):
    """One round's decision for every row.

    target_logits (B, K+1, V): row k is the target's view of the place of draft token k (from 0),
        row K of the bonus.
    draft_logits (B, K, V): exactly what the draft tokens were drawn from; None if they were not
        drawn but proposed outright, which makes draft_q one-hot.
    draft_tokens (B, K) int64; -1 pads the end of a shorter chain, whose length is its own K.
    coins (B, K+1) float64 in [0, 1): coin k < K for token k, coin K draws, however long a chain is.
    temperature: float or (B,), >= 0; 0 is greedy: keep while the draft token is the argmax, then
        the argmax.

    Returns num_accepted (B,) int64 in 0..K and next_token (B,) int64, an id with target_p > 0.
    Raises ValueError on shapes, dtypes, ids or coins out of range, and NoDistribution if a row of
    logits that is read has none: under the block rule every row of the chain, under the token rule
    those up to the first rejection."""
    B, K = draft_tokens.shape
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=target_logits.device)
    if temperature.ndim == 0:
        temperature = temperature.expand(B)
    check(target_logits, draft_logits, draft_tokens, coins, temperature, rule)
    fused = kernel(target_logits.device.type)
    floats = [x.dtype for x in (target_logits, draft_logits) if x is not None]
    if torch.float64 in floats:  # the kernel reads float32 and what is shorter
        fused = None
    decide = fused or accept_torch
    num_accepted, next_token, status = decide(
        target_logits, draft_logits, draft_tokens, coins, temperature, rule == "block"
    )
    status = status.tolist()  # (B,), 0 if all is well: the one transfer to the host
    if any(status):
        reason = min(filter(None, status))
        rows = [b for b, s in enumerate(status) if s == reason]
        kind = NoDistribution if reason == len(REASONS) - 1 else ValueError
        raise kind(f"{REASONS[reason]}; batch rows {rows}")
    return num_accepted, next_token


def check(target_logits, draft_logits, draft_tokens, coins, temperature, rule):
    B, K = draft_tokens.shape
    V = target_logits.shape[-1]
    wanted = {
        "target_logits": (target_logits, (B, K + 1, V), None),
        "draft_logits": (draft_logits, (B, K, V), None),
        "draft_tokens": (draft_tokens, (B, K), torch.int64),
        "coins": (coins, (B, K + 1), torch.float64),
        "temperature": (temperature, (B,), torch.float64),
    }
    for name, (x, shape, dtype) in wanted.items():
        if x is None and name == "draft_logits":
            continue
        if x.shape != shape or not (x.dtype == dtype if dtype else x.is_floating_point()):
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name}: expected {shape} {dtype or 'floats'}, got {got}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


if __name__ == "__main__":
    from bench.slow_motion import main

    main()
