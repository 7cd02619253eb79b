"""The policy gradient: serving is the environment, the draft the policy, tokens the reward.

The objective is the expected number of accepted tokens of a round.  Of a chain x_1..x_K, with p and
q for the target's and the draft's distribution at each place, after temperature, verify.py keeps j
tokens or more with probability w_j = u_j / q(x_1..x_j), where

    u_j = min(q(x_1..x_j), u_{j-1} p_j(x_j))     under the block rule,
    u_j = prod_{i<=j} min(q_i, p_i)(x_i)         under the token rule,

so L = sum_j sum_x u_j.  Textbook REINFORCE, "reward times grad log q", is biased here, since the
reward w depends on q too: grad E_{x~q}[w] = E_{x~q}[w grad log q] + E_{x~q}[grad w], and the second
term cancels the first wherever q is too large already.  But divide by the probability with which
the tokens were drawn, their *behaviour* b, whoever drew them (the draft as it is, the draft as it
was when it served, the target itself), and b is a constant:

    L = E_{x~b}[ sum_j U_j ],    U_j = u_j / b(x_1..x_j),    if b > 0 wherever u_j > 0,

so autograd straight through U is exact.  With Q_j = prod_i q_i / b_i, both rules are one recursion,

    U_j = min(c_j q_j(x_j), U_{j-1} p_j(x_j)) / b_j(x_j),
    A_j = sum_v min(c_j q_j(v), U_{j-1} p_j(v)),

c_j = Q_{j-1} under the block rule and U_{j-1} under the token rule.  A_j is the mean of U_j over
x_j: its last factor in closed form.  From the target's own tokens (b = p) the block rule's U_j is
min(1, Q_1, .., Q_j), the running minimum of the likelihood ratio.  The ladder:

    reinforce_textbook   sum_j U_j grad log q(x_1..x_j)        biased: the counter-example
    reinforce            sum_j grad U_j                        grad L
    expected             sum_j grad A_j                        grad L, less noise: the default
    log                  sum_j U_{j-1} grad log A_j            not grad L: normalised
    kl                   - sum_j grad KL(p_j || q_j)           not grad L: distillation

log divides the gradient at every place by what is expected there, A_j / U_{j-1}: the reward of a
draft that is far off vanishes, and so does its gradient, but not their ratio (down to 1e-9).  Both
it and kl leave a draft alone that is the target: at q = p all A_j are 1, as large as they can be.
`python rl.py` measures, by enumeration, how each compares with grad L.

All of it is conditional on where rounds start and on the rules by which chains end; that the draft
moves those too is ignored.

Letters: R rounds, K drafted tokens a round, V vocabulary.
"""

from dataclasses import dataclass

import torch

LARGEST = 20.0  # of log Q, against overflow: the minimum then is the other side, p's


@dataclass
class Terms:
    """What estimators are made of, (R, K) each, with gradient in q; at pads (-1) U = A = 0."""

    U: torch.Tensor  # the weight of having kept x_1..x_j
    before: torch.Tensor  # U_{j-1}
    A: torch.Tensor  # U_j, its last token in closed form
    log_q: torch.Tensor  # log draft_q of the tokens
    ratio: torch.Tensor  # q_j / b_j
    under: torch.Tensor  # how often q is what the minimum takes, by draft_q


def terms(draft_logits, target_logits, tokens, temperature, behaviour, rule):
    """behaviour (R, K): log-probabilities of the tokens when they were drawn; "draft": drawn from
    the draft as it is now; "target": from the target."""
    log_q, target_p = log_distributions(draft_logits, target_logits, temperature)
    real, ids = tokens >= 0, tokens.clamp(min=0)[..., None]
    log_q_x = torch.where(real, log_q.gather(-1, ids).squeeze(-1), 0.0)
    p_x = target_p.gather(-1, ids).squeeze(-1)
    if isinstance(behaviour, str):
        log_b = log_q_x.detach() if behaviour == "draft" else p_x.log()
        log_b = torch.zeros_like(log_b) if temperature == 0 else log_b  # an argmax is no draw
    else:
        log_b = behaviour.detach().to(p_x.dtype)
    log_b = torch.where(real & log_b.isfinite(), log_b, 0.0)
    log_ratio = log_q_x - log_b

    draft_q, p_over_b = log_q.exp(), torch.where(real, p_x / log_b.exp(), 0.0)
    U, log_Q, columns = torch.ones_like(p_x[:, 0]), torch.zeros_like(p_x[:, 0]), []
    for j, (q_j, p_j) in enumerate(zip(draft_q.unbind(1), target_p.unbind(1))):  # (R, V) each
        carry = log_Q.clamp(max=LARGEST).exp() if rule == "block" else U
        q_side, p_side = carry[:, None] * q_j, U[:, None] * p_j
        A = lesser(q_side, p_side).sum(-1) * real[:, j]
        under = torch.where(q_side < p_side, q_j, 0.0).sum(-1).detach()
        columns.append((U, A, under))
        q_side = carry * log_ratio[:, j].clamp(max=LARGEST).exp()
        U = lesser(q_side, U * p_over_b[:, j]) * real[:, j]
        log_Q = log_Q + log_ratio[:, j]
    before, A, under = (torch.stack(x, dim=1) for x in zip(*columns))
    return Terms(torch.cat([before[:, 1:], U[:, None]], dim=1), before, A, log_q_x,
                 log_ratio.clamp(max=LARGEST).exp() * real, under)


def lesser(q_side, p_side):
    """Their minimum.  At a tie the gradient is p_side's alone, where torch.minimum's is halved:
    ties are the rule where q = p, and with a p that is one-hot."""
    return torch.where(q_side < p_side, q_side, p_side)


def log_distributions(draft_logits, target_logits, temperature):
    """log q with gradient and p without, (R, K, V).  Temperature 0: p is one-hot, q is learned at
    temperature 1."""
    dtype = torch.promote_types(draft_logits.dtype, torch.float32)
    draft_logits, target_logits = draft_logits.to(dtype), target_logits.detach().to(dtype)
    if temperature == 0:
        best = target_logits.argmax(-1, keepdim=True)
        target_p = torch.zeros_like(target_logits).scatter_(-1, best, 1.0)
        return draft_logits.log_softmax(-1), target_p
    return (draft_logits / temperature).log_softmax(-1), (target_logits / temperature).softmax(-1)


def reinforce_textbook(c):
    score = c.log_q - c.log_q.detach()  # 0, with the gradient of log q
    return c.U.detach() * (1 + score.cumsum(1))


def reinforce(c):
    return c.U


def expected(c):
    return c.A


def log(c):
    alpha = c.A / c.before.detach().clamp(min=1e-30)
    return c.before.detach() * torch.where(c.A > 0, alpha.clamp(min=1e-9), 1.0).log()


ESTIMATORS = {"reinforce_textbook": reinforce_textbook, "reinforce": reinforce,
              "expected": expected, "log": log}
OWN_REWARD = {"reinforce": 1, "expected": 0}  # whether x_j's own reward multiplies its score


def baseline(c, own_reward):
    """(R, K), to subtract: what x_j is worth, guessed from what stands before it.  If overlaps stay
    as they are here, alpha + alpha^2 + .. more tokens.  Its gradient has mean 0, as
    E_{x~b}[(q/b) grad log q] = 0; it moves the loss's value, though."""
    alpha = (c.A / c.before.clamp(min=1e-30)).detach().clamp(max=0.999)
    left = torch.arange(c.A.shape[1] - 1, -1, -1, device=alpha.device)  # places after x_j
    ahead = alpha * (1 - alpha**left) / (1 - alpha)
    return (c.before * c.under * (ahead + own_reward)).detach() * c.ratio


def policy_gradient_loss(draft_logits, target_logits, tokens, temperature=1.0, estimator="expected",
                         behaviour="draft", rule="block"):
    """A scalar whose gradient is minus the estimator's, the mean over rounds.

    draft_logits (R, K, V) with gradient; target_logits (R, K, V): the target's view of the same
    places; tokens (R, K) int64, -1 pads; behaviour as of `terms`.  temperature: the one that
    served.  `reinforce` and `expected` are unbiased from R = 1 on.  The target's tokens get no
    baseline: q / p has no bound, and where p is cut its mean is not 1.
    At temperature 0 each token counts as drawn with b = 1, exact as far as the chain is p's own."""
    if estimator == "kl":
        return forward_kl(draft_logits, target_logits, tokens, temperature)
    c = terms(draft_logits, target_logits, tokens, temperature, behaviour, rule)
    utility = ESTIMATORS[estimator](c)
    if estimator in OWN_REWARD and temperature > 0 and behaviour != "target":
        utility = utility - baseline(c, OWN_REWARD[estimator])
    return -utility.sum(1).mean()


def forward_kl(draft_logits, target_logits, tokens, temperature):
    """sum_j KL(p_j || q_j) over places that are no pads, mean over rounds.  Ids that the draft
    cannot say (-inf) are left out: nothing can be learned there, and the KL is infinite."""
    log_q, target_p = log_distributions(draft_logits, target_logits, temperature)
    shared = (target_p > 0) & (log_q > float("-inf"))
    log_ratio = torch.where(shared, target_p.clamp(min=1e-38).log() - log_q, 0.0)
    return ((target_p * log_ratio).sum(-1) * (tokens >= 0)).sum(1).mean()


@torch.no_grad()
def acceptance(draft_logits, target_logits, tokens, temperature=1.0, rule="block"):
    """How often each place of a chain is kept, given that those before it were: (K,).  tokens
    (R, K) are the target's own.  1 + the sum of its cumulative product is the acceptance length to
    expect.  At temperature 0, where both take their argmax, as often as it is the same."""
    real = tokens >= 0
    if temperature == 0:
        agree = (draft_logits.argmax(-1) == target_logits.argmax(-1)) & real
        kept = agree.float().cumprod(1)
        before = torch.cat([torch.ones_like(kept[:, :1]), kept[:, :-1]], dim=1) * real
    else:
        c = terms(draft_logits, target_logits, tokens, temperature, "target", rule)
        kept, before = c.A, c.before * real
    return kept.sum(0) / before.sum(0).clamp(min=1e-9)


if __name__ == "__main__":
    from bench.ladder import main

    main()
