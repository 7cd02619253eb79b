"""The acceptance rule of speculative decoding: how many drafted tokens to keep, and the token after them.

The draft proposed x_0..x_{K-1}, x_k drawn from draft_q_k.  The target, in one forward pass, says target_p_k
at each of those places and at the one after.  From left to right, keep x_k with probability
min(1, target_p_k(x_k) / draft_q_k(x_k)) and stop at the first that is not kept.  There, draw the next
token from the *residual*, max(0, target_p - draft_q) renormalised; if all were kept, draw it from
target_p_K, the bonus.  Why this is lossless: id v comes out with probability

    draft_q(v) min(1, target_p(v)/draft_q(v)) + (1 - overlap) residual(v)
    = min(target_p, draft_q)(v) + max(0, target_p - draft_q)(v) = target_p(v),

where overlap = sum_v min(target_p, draft_q)(v) is how often a drafted token is kept.
(Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318, theorem 1.)

Nothing here knows about models.  Randomness is an argument: the same coins give the same tokens.
Letters: B batch rows, K drafted tokens a round, V vocabulary.
"""

import torch


def probabilities(logits, temperature):
    """softmax(logits / temperature) in float64; temperature 0 puts all mass on the (first) argmax.

    logits (..., V) of any float dtype, -inf meaning impossible; temperature (...) float64, broadcast over V.
    A row that holds a NaN or a +inf, or nothing but -inf, comes out as NaN."""
    logits = logits.double()
    temperature = temperature[..., None]
    greedy = temperature == 0
    soft = torch.softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy & ~soft.isnan(), hard, soft)


def inverse_cdf(mass, coin):
    """The first id whose cumulative mass exceeds coin * total: a draw from mass / total, always of mass > 0.

    mass (..., V) float64, not negative, total > 0; coin (...) float64 in [0, 1).  Returns (...) int64."""
    cumulative = mass.cumsum(-1)
    threshold = coin[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=mass.shape[-1] - 1)


def accept(target_logits, draft_logits, draft_tokens, coins, temperature=1.0):
    """One round's decision for every row.

    target_logits (B, K+1, V): row k is the target's view of the place of draft token k, row K of the bonus.
    draft_logits (B, K, V): exactly what the draft tokens were drawn from, or None if they were not drawn but
        proposed outright (draft_q is then one-hot, so a token is kept with probability target_p).
    draft_tokens (B, K) int64; -1 pads the tail of a shorter draft and is never kept: there, the next token
        comes from target_p.
    coins (B, K+1) float64 in [0, 1): coin k < K decides about token k, coin K draws the next token.
    temperature: float or (B,), >= 0; 0 is greedy: keep while the draft token is the argmax, then the argmax.

    Returns num_accepted (B,) int64 in 0..K and next_token (B,) int64, an id with target_p > 0.
    Raises ValueError on shapes, dtypes, ids or coins out of range, and if a row of logits that the decision
    rests on has no distribution (NaN, +inf, all -inf); rows after the first rejection are not looked at.
    """
    B, K = draft_tokens.shape
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=target_logits.device)
    if temperature.shape not in ((), (B,)):
        raise ValueError(f"temperature must be a float or (B,) = ({B},), got {tuple(temperature.shape)}")
    temperature = temperature.expand(B)
    _check_arguments(target_logits, draft_logits, draft_tokens, coins, temperature)

    target_p = probabilities(target_logits, temperature[:, None])  # (B, K+1, V)
    ids = draft_tokens.clamp(min=0)[..., None]  # (B, K, 1)
    draft_q = torch.zeros_like(target_p[:, :K]).scatter_(-1, ids, 1.0)  # as proposed outright
    if draft_logits is not None:
        sampled = (temperature > 0)[:, None, None]  # at temperature 0 the draft's choice is no draw either
        draft_q = torch.where(sampled, probabilities(draft_logits, temperature[:, None]), draft_q)

    p = target_p[:, :K].gather(-1, ids).squeeze(-1)  # (B, K): target_p(x_k), draft_q(x_k)
    q = draft_q.gather(-1, ids).squeeze(-1)
    drafted = draft_tokens >= 0
    kept = (coins[:, :K] * q < p) & drafted  # strict: a coin of 0 keeps nothing impossible
    num_accepted = kept.long().cumprod(-1).sum(-1)  # (B,) length of the kept prefix

    # The row at which each chain stopped: the residual after a rejection, target_p after K or at a pad.
    row = torch.arange(B, device=draft_tokens.device)
    mass = target_p[row, num_accepted]  # (B, V)
    if K:
        last = num_accepted.clamp(max=K - 1)
        rejected = (num_accepted < K) & drafted[row, last]
        residual = torch.where(rejected[:, None], mass - draft_q[row, last], mass).clamp(min=0)
        empty = residual.sum(-1, keepdim=True) == 0  # target_p = draft_q up to rounding
        mass = torch.where(empty, mass, residual)
    next_token = inverse_cdf(mass, coins[:, K])

    position = torch.arange(K + 1, device=draft_tokens.device)
    read = position <= num_accepted[:, None]  # (B, K+1) the rows that the decision rests on
    broken = (read & target_p[..., 0].isnan()).any() | (read[:, :K] & drafted & draft_q[..., 0].isnan()).any()
    if broken:
        raise ValueError("logits without a distribution (NaN, +inf or all -inf) in a row that acceptance reads")
    return num_accepted, next_token


def _check_arguments(target_logits, draft_logits, draft_tokens, coins, temperature):
    B, K = draft_tokens.shape
    V = target_logits.shape[-1]
    if target_logits.shape != (B, K + 1, V):
        raise ValueError(f"target_logits must be (B, K+1, V) = ({B}, {K + 1}, {V}), got {tuple(target_logits.shape)}")
    if draft_logits is not None and draft_logits.shape != (B, K, V):
        raise ValueError(f"draft_logits must be (B, K, V) = ({B}, {K}, {V}), got {tuple(draft_logits.shape)}")
    if coins.shape != (B, K + 1) or coins.dtype != torch.float64:
        raise ValueError(f"coins must be (B, K+1) = ({B}, {K + 1}) float64, got {tuple(coins.shape)} {coins.dtype}")
    if draft_tokens.dtype != torch.int64:
        raise ValueError(f"draft_tokens must be int64, got {draft_tokens.dtype}")
    if not ((coins >= 0) & (coins < 1)).all():
        raise ValueError("coins must lie in [0, 1)")
    if not ((draft_tokens >= -1) & (draft_tokens < V)).all():
        raise ValueError(f"draft_tokens must be -1 (pad) or ids in 0..{V - 1}")
    if not (temperature >= 0).all():
        raise ValueError("temperature must be 0 (greedy) or positive")
