"""The acceptance rules of verify.py for a batch, in torch: what decides where no kernel can.

verify.py says why they are lossless; its `accept_one` is the definition that this is tested
against, and kernels.cu the fused form.

Letters: B batch rows, K drafted tokens a round, V vocabulary.
"""

import torch

from support.sampling import inverse_cdf, probabilities


def accept_torch(target_logits, draft_logits, draft_tokens, coins, temperature, block):
    """verify.accept_one for B rows at once, shapes as of verify.accept -> num_accepted, next_token
    and status (B,) int64 each; status is 0 or the index of one of verify.REASONS."""
    B, K = draft_tokens.shape
    row, place = torch.arange(B, device=coins.device), torch.arange(K + 1, device=coins.device)
    drafted = draft_tokens >= 0
    length = drafted.sum(1)  # (B,) each row's own K
    ids = draft_tokens.clamp(0, target_logits.shape[-1] - 1)[..., None]  # (B, K, 1)

    sane = temperature.clamp(min=0).nan_to_num()[:, None]
    target_p = probabilities(target_logits, sane)  # (B, K+1, V)
    draft_q = torch.zeros_like(target_p[:, :K]).scatter_(-1, ids, 1.0)  # as if proposed outright
    if draft_logits is not None:
        sampled = (temperature > 0)[:, None, None]  # a greedy draft's choice is no draw either
        draft_q = torch.where(sampled, probabilities(draft_logits, sane), draft_q)
    p = target_p[:, :K].gather(-1, ids).squeeze(-1)  # (B, K) of the drafted tokens
    q = draft_q.gather(-1, ids).squeeze(-1)

    if block:
        w = [torch.ones_like(coins[:, 0])]
        for k in range(K):
            w.append((w[-1] * p[:, k] / q[:, k].clamp(min=1e-300)).clamp(max=1))
        w = torch.stack(w, dim=1)  # (B, K+1): w_0..w_K
        m = (w[:, :K, None] * target_p[:, :K] - draft_q).clamp(min=0).sum(-1)  # m_0..m_{K-1}
        m = torch.cat([m, w[:, K:]], dim=1)  # m_K is not looked at
        whole = place == length[:, None]  # h_K = w_K
        over, under = torch.where(whole, w, m), torch.where(whole, 1.0, m + (1 - w))
        kept = (coins[:, :K] * under[:, 1:] < over[:, 1:]) & drafted  # coin_i < h_i, i = 1..K
        num_accepted = (kept * place[1:]).amax(1) if K else length
        read = place <= length[:, None]
    else:
        w = torch.ones_like(coins)
        kept = (coins[:, :K] * q < p) & drafted
        num_accepted = kept.long().cumprod(1).sum(1)
        read = place <= num_accepted[:, None]

    target_row = target_p[row, num_accepted]  # (B, V)
    mass = target_row
    if K:
        last = num_accepted.clamp(max=K - 1)
        rest = w[row, num_accepted, None] * target_row - draft_q[row, last]
        mass = torch.where((num_accepted < length)[:, None], rest.clamp(min=0), target_row)
        mass = torch.where(mass.sum(-1, keepdim=True) == 0, target_row, mass)
    next_token = inverse_cdf(mass, coins[:, K])

    broken = (read & target_p[..., 0].isnan()).any(1)
    broken |= (read[:, :K] & drafted & draft_q[..., 0].isnan()).any(1)
    bad_token = (draft_tokens < -1) | (draft_tokens >= target_logits.shape[-1])
    bad_token[:, 1:] |= drafted[:, 1:] & ~drafted[:, :-1]
    bad_coin = ~((coins >= 0) & (coins < 1))
    faults = bad_coin.any(1), bad_token.any(1), ~(temperature >= 0), broken
    status = torch.zeros_like(length)
    for reason in (4, 3, 2, 1):  # the caller's own mistake is told first
        status = torch.where(faults[reason - 1], reason, status)
    return num_accepted, next_token, status
