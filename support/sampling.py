"""From logits to a distribution and from a coin to a token: temperature, top-k, top-p, inverse CDF.

Randomness is an argument everywhere: the same coins give the same tokens.
Letters: B batch rows, T places, V vocabulary.
"""

import torch


def probabilities(logits, temperature):
    """softmax(logits / temperature) in float64; temperature 0 puts all mass on the first argmax.

    logits (..., V) of any float dtype, -inf meaning impossible; temperature (...) float64.
    A row that holds a NaN or a +inf, or nothing but -inf, comes out as NaN."""
    logits, temperature = logits.double(), temperature[..., None]
    greedy = temperature == 0
    soft = torch.softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy & ~soft.isnan(), hard, soft)


def inverse_cdf(mass, coin):
    """The first id whose cumulative mass exceeds coin * total: a draw from mass / total.

    mass (..., V) float64, not negative, total > 0; coin (...) float64 in [0, 1) -> (...) int64,
    always an id of mass > 0."""
    cumulative = mass.cumsum(-1)
    threshold = coin[..., None] * cumulative[..., -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp(max=mass.shape[-1] - 1)


def keep_top(logits, temperature, top_p, top_k):
    """logits with -inf wherever top-k, and then top-p, cut; what ties with the last one kept stays.

    logits (B, ..., V); (B,) each: temperature float64, 0 cuts nothing; top_p float64 in (0, 1], the
    least share of what temperature and top-k leave that is to be kept, 1 is off; top_k int64, 0 is
    off."""
    shape = -1, *[1] * (logits.ndim - 1)
    temperature, top_p, top_k = (x.view(shape) for x in (temperature, top_p, top_k))
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = logits.sort(-1, descending=True).values
    scaled = ordered.double() / torch.where(temperature > 0, temperature, 1.0)
    scaled = scaled.masked_fill((top_k > 0) & (rank >= top_k), float("-inf"))
    mass = scaled.softmax(-1)
    kept = (mass.cumsum(-1) - mass < top_p) | (top_p == 1)  # a prefix
    kept &= scaled > float("-inf")
    least = ordered.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return logits.masked_fill((logits < least) & (temperature > 0), float("-inf"))


class Sampling:
    """How the logits of B rows become distributions: a law (temperature, top_p, top_k) a row."""

    def __init__(self, laws, device=None):
        temperature, top_p, top_k = zip(*laws)
        self.temperature = torch.tensor(temperature, dtype=torch.float64, device=device)  # (B,)
        self.top_p = torch.tensor(top_p, dtype=torch.float64, device=device)
        self.top_k = torch.tensor(top_k, dtype=torch.int64, device=device)
        self.cuts = any(p < 1 or k > 0 for _, p, k in laws)

    def filter(self, logits):
        """(B, ..., V) -> the same, -inf where a row's top-k and top-p cut."""
        if not self.cuts:
            return logits
        return keep_top(logits, self.temperature, self.top_p, self.top_k)

    def draw(self, logits, coins):
        """A token a row.  logits (B, V), coins (B,) -> the logits that it is drawn from, filtered;
        the token (B,) int64; its log-probability (B,) float32, 0 at temperature 0; and how sure the
        draft was (B,), its probability, at temperature 0 as if that were 1."""
        logits = self.filter(logits)
        p = probabilities(logits, self.temperature)
        token = inverse_cdf(p, coins)
        chance = p.gather(-1, token[:, None]).squeeze(-1)
        greedy = (logits.amax(-1) - logits.logsumexp(-1)).exp()
        sure = torch.where(self.temperature > 0, chance, greedy.double())
        return logits, token, chance.log().float(), sure
