"""Small random models and languages, and the statistics that tests share."""

import itertools
from dataclasses import replace

import torch

from draft import Draft, head_config
from generation import Generation, Request
from model import Config, Transformer

ALARM_Z = 4.753  # one-sided normal quantile of 1e-6


def assert_law(counts, expected_p):
    """Chi-square of counts (N,) against probabilities (N,); cells expected under 5 times are
    pooled.  Were the seed drawn anew, it would raise a false alarm with probability 1e-6."""
    counts = torch.as_tensor(counts).double()
    expected = torch.as_tensor(expected_p).double() * counts.sum()
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


def language(seed, K=3, V=3, scale=1.0):
    """Logits for every prefix of up to K tokens, {prefix: (V,)}: a whole tiny language."""
    g = torch.Generator().manual_seed(seed)
    table = {}
    for k in range(K + 1):
        for prefix in itertools.product(range(V), repeat=k):
            table[prefix] = scale * torch.randn(V, generator=g, dtype=torch.float64)
    return table


def tiny_target(seed=0, gain=1.0, dtype=torch.float32, **changes):
    sizes = dict(
        vocab_size=17, hidden_size=32, intermediate_size=48, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        bos_token_id=16, suppress_tokens=(16,),
    )
    torch.manual_seed(seed)
    target = Transformer(Config(**(sizes | changes)))
    for p in target.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)
    return target.to(dtype).eval()


def tiny_draft(target, seed=1, vocabulary=None):
    torch.manual_seed(seed)
    config = replace(head_config(target.config), num_attention_heads=4, num_key_value_heads=2)
    draft = Draft(target, config, vocabulary).to(target.lm_head.weight.dtype)
    for p in draft.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return draft


def request(length=9, new=20, seed=0, temperature=1.0, **more):
    g = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(0, 16, (length,), generator=g).tolist()
    return Request([16, *ids], new, seed, temperature, **more)


def play(target, draft, requests, rule_of_length, own_memory=False, shared=None, rule="block"):
    """Serves a batch to its end -> the Generation, and what every round drafted."""
    generation, rounds = Generation(target, draft, requests, own_memory, shared, rule), []
    while not generation.done:
        plan = rule_of_length.choose(generation.recall())
        drafted = generation.draft_tokens(plan)
        generation.commit(drafted, *generation.verify(drafted))
        rounds.append(drafted)
    return generation, rounds
