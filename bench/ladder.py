"""python rl.py: what the estimators make of the exact gradient, by enumeration.

Random languages of 4 tokens, chains of 3.  near: the target's logits are the draft's and 0.6 noise;
far: independent and sharp.  cosine and length (in lengths of the exact gradient): of the mean, 1
and 1 if unbiased.  noise: the variance of a round over the square of that mean, that is, how many
rounds to average until noise and signal are equally long; for tokens that the draft drew, and that
the target drew.
"""

import argparse

import torch

from rl import ESTIMATORS, policy_gradient_loss

V, K = 4, 3


def exact_objective(draft_logits, target_logits, tokens, rule):
    """L from all V^K chains (N, K, V), each prefix of length j being there V^(K-j) times."""
    ids = tokens[..., None]
    q = draft_logits.softmax(-1).gather(-1, ids)[..., 0]
    p = target_logits.softmax(-1).gather(-1, ids)[..., 0]
    u = drawn = torch.ones_like(q[:, 0])
    total = 0.0
    for j in range(K):
        drawn = drawn * q[:, j]
        u = torch.minimum(drawn if rule == "block" else u * q[:, j], u * p[:, j])
        total = total + u.sum() / V ** (K - 1 - j)
    return total


def measured(estimator, rule, seed, far, behaviour):
    """-> cosine, length, noise of one estimator on one language."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = (V**K - 1) // (V - 1)
    draft, other = torch.randn(2, prefixes, V, generator=generator, dtype=torch.float64)
    draft, target = (2 * draft, 2 * other) if far else (draft, draft + 0.6 * other)
    tokens = torch.cartesian_prod(*[torch.arange(V)] * K)  # (V^K, K)
    row = [(V**k - 1) // (V - 1) + tokens[:, :k] @ V ** torch.arange(k) for k in range(K)]
    row = torch.stack(row, dim=1)  # (V^K, K): which prefix stands before each token
    draft_logits, target_logits = draft[row].requires_grad_(), target[row]

    L = exact_objective(draft_logits, target_logits, tokens, rule)
    sides = draft_logits, target_logits
    loss = policy_gradient_loss(*sides, tokens, 1.0, estimator, behaviour, rule)
    exact, = torch.autograd.grad(L, draft_logits, retain_graph=True)
    each, = torch.autograd.grad(-len(tokens) * loss, draft_logits)
    drawn = target_logits if behaviour == "target" else draft_logits.detach()
    chance = drawn.softmax(-1).gather(-1, tokens[..., None])[..., 0].prod(1)[:, None, None]

    def by_prefix(gradient):
        return torch.zeros_like(draft).index_add(0, row.flatten(), gradient.flatten(0, 1))

    exact, mean = by_prefix(exact), by_prefix(chance * each)
    cosine = (mean * exact).sum() / (mean.norm() * exact.norm())
    noise = (chance * each**2).sum() / mean.norm() ** 2 - 1
    return torch.stack([cosine, mean.norm() / exact.norm(), noise])


def main():
    parser = argparse.ArgumentParser(prog="rl.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rule", choices=("block", "token"), default="block")
    parser.add_argument("--languages", type=int, default=20)
    args = parser.parse_args()
    if args.languages < 1:
        parser.error("--languages must be at least 1")
    print(f"{args.rule} rule, {args.languages} languages: medians\n")
    print(f"{'':20s}{'near: cosine  length   noise  noise*':>40s}"
          f"{'far: cosine  length   noise  noise*':>40s}   (*: the target's tokens)")
    for estimator in (*ESTIMATORS, "kl"):
        cells = []
        for far in (False, True):
            for behaviour in ("draft", "target"):
                seeds = range(args.languages)
                values = [measured(estimator, args.rule, s, far, behaviour) for s in seeds]
                values = torch.stack(values).median(0).values.tolist()
                cells += values[2:] if behaviour == "target" else values
        print(f"{estimator:20s}" + "".join(f"{x:10.2f}" for x in cells))


if __name__ == "__main__":
    main()
