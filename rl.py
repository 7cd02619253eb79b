"""The learner: serving is the environment, the draft is the policy, accepted tokens are the reward.

The objective is the expected number of accepted tokens of a round.  With p, q the target's and the draft's
distribution at each place of the chain, after temperature,

    L = sum_j E_{x ~ q}[ prod_{i<=j} min(1, p_i(x_i) / q_i(x_i)) ] = sum_j sum_x prod_{i<=j} min(p_i, q_i)(x_i).

Textbook REINFORCE, "reward times grad log q", is biased here, because the reward r = min(1, p/q) depends on q too:

    grad E_{x ~ q}[r] = E_{x ~ q}[r grad log q] + E_{x ~ q}[grad r],     grad r = -r grad log q where q > p, else 0.

The second term cancels the first wherever q > p; the textbook, which lacks it, also pushes up what the draft proposes too
often already.  For chains, whoever drew their tokens (the draft as it is now, the draft as it was when it served, the
target itself), divide by the probability with which they were drawn, their *behaviour*:

    L = E_{x ~ behaviour}[ sum_j S_j ],     S_j = prod_{i<=j} a_i,     a_i = min(p_i, q_i)(x_i) / behaviour_i(x_i).

behaviour is a constant, so differentiating S is exact: grad S_j = S_j sum_{i<=j} 1[q_i < p_i] grad log q_i(x_i).
With alpha_j = sum_v min(p_j, q_j), the overlap, which is the probability that a drafted token is kept, the ladder is

    reinforce_textbook   sum_j S_j sum_{i<=j} grad log q_i(x_i)    biased, the counter-example
    reinforce            sum_j grad S_j                            grad L
    expected             sum_j grad (S_{<j} alpha_j)               grad L, the last factor of each S_j in closed form
    log                  sum_j S_{<j} grad log alpha_j             NOT grad L, but it vanishes at the same best draft, q = p
    kl                   - sum_j grad KL(p_j || q_j)               likewise; what Aurora's public code trains

`python rl.py` measures it.  A baseline is free for tokens that the draft drew: E_{x ~ behaviour}[(q / behaviour) grad log q]
= 0, so b * (q / behaviour) grad log q may be subtracted at every token, as long as b depends on those before it alone.
log is the default: its gradient is 1/alpha larger where grad alpha vanishes, and it ended highest in the README's experiment.

All of it is conditional on where rounds start, and on the rule by which the draft's confidence ends their chains
(draft.DraftLength); that the draft also moves the starts, and its confidence, is ignored.

Letters: R rounds, K drafted tokens a round, V vocabulary, T tokens of a sequence.
"""

import argparse
import importlib.util
import itertools
import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from draft import twin
from model import UserError
from verify import Sampling
from versions import Gate

ESTIMATORS = {  # each for what the one before it lacks
    "reinforce_textbook": "the probability of acceptance times grad log q: biased, since that reward depends on q too",
    "reinforce": "differentiates the reward as well: unbiased, but one sampled token speaks for all that might have been",
    "expected": "all that might have been, by its probability: less noise, but hardly a gradient where there is hardly overlap",
    "log": "the log of the overlap: no estimate of this gradient, another goal with the same best draft, and strong from afar",
    "kl": "forward KL, distillation: likewise, with every place alike, reached or not; further from what acceptance asks for",
}


def _log_distributions(draft_logits, target_logits, temperature):
    """log q with gradient and p without, (R, K, V).  Temperature 0: p is one-hot, q is learned at temperature 1."""
    dtype = torch.promote_types(draft_logits.dtype, torch.float32)
    target_logits = target_logits.detach().to(dtype)
    if temperature == 0:
        target_p = torch.zeros_like(target_logits).scatter_(-1, target_logits.argmax(-1, keepdim=True), 1.0)
        return draft_logits.to(dtype).log_softmax(-1), target_p
    return (draft_logits.to(dtype) / temperature).log_softmax(-1), (target_logits / temperature).softmax(-1)


def _chain(draft_logits, target_logits, tokens, temperature, behaviour_logprobs):
    """The quantities that every estimator is made of, each (R, K); pads (-1) have a = alpha = 0.

    a        min(p, q)(x) / behaviour(x)         alpha  sum_v min(p, q), the overlap
    ratio    q(x) / behaviour(x)                 below  sum over v with q < p of q: how often the indicator holds
    `behaviour_logprobs` None: drawn from q itself; "target": drawn from p; else log-probabilities (R, K)."""
    log_q, target_p = _log_distributions(draft_logits, target_logits, temperature)
    draft_q = log_q.exp()
    smaller = torch.where(draft_q < target_p, draft_q, target_p)  # min, with the gradient on q alone where q < p
    real = tokens >= 0
    ids = tokens.clamp(min=0)[..., None]
    p, q, least = (x.gather(-1, ids).squeeze(-1) for x in (target_p, draft_q, smaller))
    if behaviour_logprobs is None:
        behaviour = q.detach() if temperature > 0 else torch.ones_like(p)
    elif isinstance(behaviour_logprobs, str):
        behaviour = p
    else:
        behaviour = behaviour_logprobs.detach().to(p.dtype).exp()
    behaviour = torch.where(real & (behaviour > 0), behaviour, 1.0)  # 0 can only be rounding: the token was drawn
    alpha = smaller.sum(-1) * real
    below = torch.where(draft_q < target_p, draft_q, 0.0).sum(-1).detach()
    return least / behaviour * real, alpha, q / behaviour * real, below


def _exclusive_cumprod(a):
    """S_{<i}: the product of the columns before i; 1 at i = 0."""
    return torch.cat([torch.ones_like(a[:, :1]), a[:, :-1]], dim=1).cumprod(1)


def policy_gradient_loss(draft_logits, target_logits, draft_tokens, temperature=1.0, estimator="log", behaviour_logprobs=None):
    """A loss whose gradient is minus the chosen estimator's.

    draft_logits (R, K, V) with gradient; target_logits (R, K, V), rows 0..K-1 of the rounds; draft_tokens (R, K) int64, -1
    pads; behaviour_logprobs (R, K): their log-probabilities when they were drawn, None if they come from the draft as it
    is now (on-policy), "target" if from the target.  temperature: float, the one that served.
    Returns a scalar, the mean over rounds.  At temperature > 0 `reinforce` and `expected` are unbiased from R = 1 on,
    whoever drew the tokens, if it could have drawn all that both p and q allow; the textbook's gradient comes with the
    same importance ratio, so its bias is the same too; `log` weighs by it, and `kl` takes the tokens as they come.
    At temperature 0 the draft proposed its argmax, which is no draw: q is learned at temperature 1 along the path that
    was proposed, each token with behaviour 1, exact as far as that path is the target's own.
    Raises ValueError for an unknown estimator."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    if estimator == "kl":
        return forward_kl_loss(draft_logits, target_logits, temperature, draft_tokens >= 0)
    a, alpha, ratio, below = _chain(draft_logits, target_logits, draft_tokens, temperature, behaviour_logprobs)
    before = _exclusive_cumprod(a)  # S_{<i}
    if estimator == "reinforce_textbook":
        score = ratio / ratio.detach().clamp(min=1e-30)  # 1, with the gradient of log q wherever q is
        utility = (a.detach() * score).cumprod(1)
    elif estimator == "reinforce":
        utility = a.cumprod(1)
    elif estimator == "expected":
        utility = before * alpha
    else:
        utility = before.detach() * torch.where(alpha > 0, alpha.clamp(min=1e-9), 1.0).log()
    if estimator in ("reinforce", "expected") and not isinstance(behaviour_logprobs, str) and temperature > 0:
        # The baseline guesses what x_i is worth from what stands before it: if the overlap stayed as it is here, the
        # chain would go on for alpha + alpha^2 + ... tokens; `expected` counts from the token after x_i.  The target's
        # tokens get none: q / p has no bound, and where p is cut the mean is not 0.
        K = a.shape[1]
        ahead = [sum((alpha[:, i] ** n for n in range(1, K - i)), torch.zeros_like(alpha[:, i])) for i in range(K)]
        worth = torch.stack(ahead, 1) + (estimator == "reinforce")
        utility = utility - (before * below * worth).detach() * ratio
    return -utility.sum(1).mean()


def target_side_loss(draft_logits, target_logits, target_tokens, temperature=1.0, estimator="expected"):
    """The same rungs from the target's own tokens: x ~ p, so behaviour = p and a = min(1, q/p).

    Shapes as above, target_tokens (R, K) drawn from the target, -1 pads.  p does not depend on the draft, so an answer never
    goes stale, and every token that the target ever emitted is an example, drafted or not."""
    return policy_gradient_loss(draft_logits, target_logits, target_tokens, temperature, estimator, "target")


def forward_kl_loss(draft_logits, target_logits, temperature=1.0, real=None):
    """sum_k KL(p_k || q_k), mean over rounds: plain distillation, the usual way to train a draft offline.

    real (R, K) bool, False at pads; None: no pads.  Ids that the draft cannot say at all (logit -inf) are left out,
    since nothing can be learned there and the KL is infinite."""
    log_q, target_p = _log_distributions(draft_logits, target_logits, temperature)
    shared = (target_p > 0) & (log_q > float("-inf"))
    kl = torch.where(shared, target_p * (target_p.log() - log_q), 0.0).sum(-1)  # (R, K)
    return (kl if real is None else kl * real).sum(1).mean()


@torch.no_grad()
def acceptance(draft_logits, target_logits, target_tokens, temperature=1.0):
    """The overlap at each place of the chain given that the chain gets there, as far as any token is no pad: (K,) or less.
    1 + the sum of its cumulative product is the acceptance length to expect.  Arguments as in target_side_loss.  At
    temperature 0, where both take their argmax, the share of places at which it is the same."""
    real = target_tokens >= 0
    if temperature == 0:
        own = target_logits.argmax(-1)
        alpha = ((draft_logits.argmax(-1) == own) & real).float()
        a = alpha * (target_tokens == own)  # a chain goes on as far as its tokens are the target's
    else:
        a, alpha, _, _ = _chain(draft_logits, target_logits, target_tokens, temperature, "target")
    before = (_exclusive_cumprod(a) * real)[:, real.any(0)]
    return (before * alpha[:, real.any(0)]).sum(0) / before.sum(0).clamp(min=1e-9)


@dataclass
class Trace:
    """What one request leaves behind: all that the learner needs, so that it never runs the target."""

    ids: torch.Tensor  # (T+1,) prompt and answer
    prompt_length: int  # tokens, the begin token included
    features: torch.Tensor  # (T, 3D) the target's, at every position but the last
    starts: torch.Tensor  # (R,) position of each round's step 0
    draft_tokens: torch.Tensor  # (R, K), -1 pads a round that drafted less
    behaviour_logprobs: torch.Tensor  # (R, K) log draft_q(token) when it was drafted
    target_hidden: torch.Tensor  # (R, K+1, D) after the target's norm, rows after a rejection too: D numbers a row, not V
    head: object  # the target's frozen head: (..., D) -> (..., V) logits
    num_accepted: torch.Tensor  # (R,)
    temperature: float
    version: int  # of the draft that served
    top_p: float = 1.0
    top_k: int = 0

    def drafted(self):
        """(R,) bool: the rounds that drafted at all; the others were plain decoding."""
        return (self.draft_tokens >= 0).any(1)

    def answer_hidden(self):
        """The target's rows at the answer's tokens, one a token: (len(ids) - prompt_length, D)."""
        row = torch.arange(self.target_hidden.shape[1])
        return self.target_hidden[row <= self.num_accepted.cpu()[:, None]]


# Top-k and top-p cut the target and the draft before acceptance, and the law of acceptance is that of what is left.  For
# the draft with gradient one thing is different: an id that its own cut dropped, but the target's kept, is given back to
# it.  Its probability would be 0 with no gradient, so it could hardly return, and a random draft, whose cut hardly meets the
# target's, hardly learns.  Wherever the draft's cut keeps all that the target's keeps, the gradient is that of the law that
# served; elsewhere it is biased, since the draft could not have drawn what it is given back.


def replaying(device):
    """The context in which a draft replays and learns: where products of a hundred rows are faster so (AMX, most GPUs), products
    and attention, and what comes of them, in bfloat16; weights, losses and steps in float32.  What the target said, and all
    serving, is left as it is."""
    cuda = device.type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def target_rows(draft, trace, hidden, tokens):
    """The target as it served, in the draft's vocabulary: hidden (N, .., D), tokens -> logits (N, .., V), tokens.

    A draft with V_draft ids of its own gets V_draft + 1 columns, the last one for all the others together: after softmax
    the target's probabilities on the draft's ids are as large as before."""
    vocabulary, T, sampling = draft.vocabulary, trace.temperature, _sampling(trace, hidden.device)
    rows = []
    for part in hidden.split(64):  # V numbers a row are not kept if the draft has fewer
        with torch.autocast(hidden.device.type, enabled=False):
            logits = sampling.filter(trace.head(part))
        if vocabulary is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            others = logits.index_fill(-1, vocabulary, float("-inf"))
            rest = T * (others / T).logsumexp(-1) if T > 0 else others.amax(-1)
            logits = torch.cat([logits[..., vocabulary], rest[..., None]], dim=-1)
        rows.append(logits)
    if vocabulary is not None:
        place = torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)
        own = torch.where(vocabulary[place] == tokens, place, len(vocabulary))
        tokens = torch.where(tokens >= 0, own, -1)
    return torch.cat(rows), tokens


def draft_rows(draft_logits, target_logits, trace):
    """The draft's logits (R, K, V) to learn from: as they served, but nothing that the target kept is cut."""
    sampling = _sampling(trace, draft_logits.device)
    if not sampling.cuts:
        return draft_logits
    cut = sampling.filter(draft_logits.detach()).isneginf() & target_logits.isneginf()
    return draft_logits.masked_fill(cut, float("-inf"))


def _sampling(trace, device):
    return Sampling([(trace.temperature, trace.top_p, trace.top_k)], device)


def replay_rounds(draft, trace, rounds=slice(None)):
    """The draft's logits (R, K, V) for those rounds of a trace, with gradient; where a round drafted less, for what
    stands in for its pads (-1)."""
    chains = trace.draft_tokens[rounds, :-1].clamp(min=0)
    return draft.replay(trace.features[None], trace.ids[None, 1:], trace.starts[None, rounds], chains[None])[0]


def replay_answer(draft, trace, K, places=None):
    """As if a round had started at every answer token, or at `places` (R,) of the answer, and the target's own tokens had
    been drafted.

    Returns draft logits (R, K, V) with gradient, not cut yet; target logits (R, K, V) as they served; tokens (R, K), -1 past
    the end; all in the draft's vocabulary."""
    answer = trace.ids[trace.prompt_length :]
    rows, own = target_rows(draft, trace, trace.answer_hidden(), answer)
    places = torch.arange(len(answer), device=answer.device) if places is None else places
    place = places[:, None] + torch.arange(K, device=answer.device)  # (R, K)
    beyond, place = place >= len(answer), place.clamp(max=len(answer) - 1)
    starts = places + trace.prompt_length - 2
    logits = draft.replay(trace.features[None], trace.ids[None, 1:], starts[None], answer[place][None, :, :-1])[0]
    return logits, rows[place], own[place].masked_fill(beyond, -1)


@torch.no_grad()
def acceptance_on(draft, trace, K, most=96):
    """A draft's acceptance at each place (K,), had tokens all over the answer, at most so many, started chains of K."""
    answer = len(trace.ids) - trace.prompt_length
    places = torch.arange(0, answer, -(-answer // most), device=trace.ids.device)
    with replaying(places.device):
        logits, target_logits, tokens = replay_answer(draft, trace, K, places)
    return acceptance(_sampling(trace, places.device).filter(logits), target_logits, tokens, trace.temperature)


def expected_length(acceptance):
    """Tokens a round to expect, by the acceptance at each place: K numbers."""
    return 1 + torch.as_tensor(acceptance).cumprod(0).sum().item()


def optimizers(model, lr, weight_decay=0.0):
    """Muon (Jordan et al. 2024) on the matrices, AdamW at a seventh of its rate on embedding, head and norms.

    A Muon step turns a matrix by the same amount in every direction that has a gradient, so a step from a single
    answer moves a trained draft without wrecking it, and a random one learns what is rare as fast as what is common."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = {n: p for n, p in trained if p.ndim == 2 and "embed" not in n and "head" not in n}
    rest = [p for n, p in trained if n not in matrices]
    if not trained:  # prompt lookup
        return []
    return [torch.optim.Muon(list(matrices.values()), lr=lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=0.15 * lr, betas=(0.9, 0.95), weight_decay=0.0)]


class Learner:
    """Learns in place on the draft it is given; what serves is a copy that the driver takes of a published version.

    target_side in 0..1 is the share of the loss that comes from the target's own tokens, in chains of `chain` that start
    at `places` places of an answer, drawn at random.  The rest comes from the draft's tokens, of as many rounds; rounds of
    plain decoding have none and teach by the target's all the same.  There is an optimizer step for every `every` tokens of
    answers (0: for every answer), so that it takes about the same share of the time whether they are short or long.  The first step of an
    update is on the new trace and `batch` - 1 from memory, further ones on as many from memory alone.  In memory are the last
    `recent` traces and, of all that are older, a sample of `reservoir` (Vitter 1985), so that what is no longer asked for is
    not forgotten.

    The rate is constant, since traffic has no end for it to fall towards.  What a falling rate is for, averaging does:
    what may serve is the mean of the weights over the last `horizon` steps or so (Polyak & Juditsky 1992).  A random draft
    (`scratch`) soon leaves its start behind, so its average covers only the last third of its steps at first.

    With a `gate` (versions.py) it learns only while that shows, and what does not show is taken back."""

    def __init__(self, draft, estimator, lr, target_side, every=0, chain=4, places=96, batch=3, recent=32, reservoir=32, horizon=60,
                 scratch=False, gate=False, seed=0):
        self.draft, self.estimator, self.target_side, self.every = draft, estimator, target_side, every
        self.chain, self.places, self.batch, self.horizon = chain, places, batch, horizon
        self.optimizers = optimizers(draft, lr)
        self.trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        once = {id(p): p.detach().clone() for p in self.trained.values()}
        self.average = {name: once[id(p)] for name, p in draft.named_parameters(remove_duplicate=False) if id(p) in once}  # tied: two names
        self.averaged = 0 if scratch else 3 * self.horizon
        self.recent, self.reservoir, self.reservoir_size, self.older = deque(maxlen=recent), [], reservoir, 0
        self.updates, self.version, self.unpublished = 0, 0, 0  # newest version; how many updates it lacks
        self.waiting = 0  # tokens that are left over from the last step
        self.generator = torch.Generator().manual_seed(seed)
        self.acceptance = []  # its estimate, place by place
        self.gate = Gate() if gate and self.trained else None
        if self.gate:
            self.examined, self.fallback = twin(draft), None
            self.set_anchor()
            self.begun = None if scratch else self.anchor

    def loss(self, trace):
        """The loss, with gradient.  A round that drafted teaches by its own tokens, one of plain decoding by the target's that
        followed."""
        T, drafted, parts = trace.temperature, trace.drafted(), []
        draft_side = (1 - self.target_side) * drafted.float().mean().item()
        if draft_side > 0:
            rounds = self.some(drafted.nonzero()[:, 0])
            behaviour = trace.behaviour_logprobs[rounds]
            target_logits, tokens = target_rows(self.draft, trace, trace.target_hidden[rounds, :-1], trace.draft_tokens[rounds])
            logits = draft_rows(replay_rounds(self.draft, trace, rounds), target_logits, trace)
            loss = policy_gradient_loss(logits, target_logits, tokens, T, self.estimator, behaviour)
            parts.append(draft_side * loss)
        if draft_side < 1:
            if self.target_side > 0:
                places = self.some(torch.arange(len(trace.ids) - trace.prompt_length, device=trace.ids.device))
            else:
                places = self.some(trace.starts[~drafted] + 2 - trace.prompt_length)
            logits, target_logits, tokens = replay_answer(self.draft, trace, self.chain, places)
            loss = target_side_loss(draft_rows(logits, target_logits, trace), target_logits, tokens, T, self.estimator)
            parts.append((1 - draft_side) * loss)
        return sum(parts)

    def some(self, places):
        """At most as many of these as the learner takes of an answer, drawn at random, in order."""
        if len(places) <= self.places:
            return places
        return places[torch.randperm(len(places), generator=self.generator)[: self.places].sort().values.to(places.device)]

    def update(self, trace):
        """One more trace is offered -> {"learn_seconds"}; with a gate its "verdict" and, unless that rests, "expected_length";
        after an update "loss", that of this trace, "expected_length" and "staleness".

        expected_length: tokens a round to expect, in chains of `chain`, on this answer before it is learned from; with a
        gate, of the draft that is to serve; without one, of the last step's weights, not of their average, which serves.
        `acceptance` holds the places that it is made of.
        staleness: versions between the one that served a trace and the newest, mean over the traces learned from.

        Raises UserError when a gradient is not finite or the weights have exploded."""
        begun, outcome = time.perf_counter(), {}
        if self.gate:
            outcome["verdict"] = self.judge(trace)
        if outcome.get("verdict") not in ("rests", "nothing gained"):
            self.waiting += len(trace.ids) - trace.prompt_length
            steps, self.waiting = divmod(self.waiting, self.every or self.waiting)
            if steps:
                outcome |= self.learn(trace, steps)
        self.remember(trace)
        if "loss" in outcome or outcome.get("verdict", "rests") != "rests":
            outcome["expected_length"] = expected_length(self.acceptance)
        return outcome | {"learn_seconds": time.perf_counter() - begun}

    def judge(self, trace):
        """The gate's verdict, by an answer that nobody has learned from.  Draws on three drafts: the average of what is learned,
        the anchor, and the fallback if there is one (versions.Gate)."""
        first = trace.num_accepted[trace.drafted().cpu()] > 0  # of each round, whatever its length
        if self.gate.rests(first.sum().item(), len(first)):
            return "rests"
        was_ahead, learned = self.gate.ahead, self.averaged != self.anchor[1]  # else the average is the anchor
        anchor = self.examine(self.anchor[0], trace)
        average = self.examine(self.average, trace) if learned else anchor
        served = average if was_ahead else anchor
        fallback = self.examine(self.fallback[0], trace) if self.fallback else served
        gain = expected_length(average) - expected_length(anchor) if learned else None
        verdict = self.gate.judge(gain, expected_length(fallback) - expected_length(served))
        serves = fallback if verdict == "falls back" else average if self.gate.ahead else anchor
        self.acceptance = serves.tolist()
        if verdict == "falls back" or was_ahead != self.gate.ahead:
            self.unpublished = float("inf")  # another draft serves, at once
        if verdict == "better":
            self.set_anchor()
            if self.fallback is not self.begun:
                self.fallback, self.gate.leads = self.begun, []  # those were another draft's
        elif verdict == "falls back":
            if was_ahead:
                self.set_anchor()  # what served
            self.anchor, self.fallback = self.fallback, self.anchor
        if verdict in ("falls back", "nothing gained"):
            self.go_back(*self.anchor)
        return verdict

    def examine(self, weights, trace):
        """The acceptance on this answer of the draft with these weights."""
        self.examined.load_state_dict(weights, strict=False)  # the rest is the same; the embedding is the target's own, which serves meanwhile
        return acceptance_on(self.examined, trace, self.chain, self.places // 2)

    def set_anchor(self):
        self.anchor = {name: p.clone() for name, p in self.average.items()}, self.averaged

    @torch.no_grad()
    def go_back(self, weights, averaged):
        """These weights, the mean of so many steps, learn on and serve as if none had come after them."""
        self.draft.load_state_dict(weights, strict=False)
        for name, p in self.average.items():
            p.copy_(weights[name])
        for optimizer in self.optimizers:
            optimizer.state.clear()
            optimizer.zero_grad()
        self.averaged = averaged

    def learn(self, trace, steps):
        """So many steps, the first of them on this trace and others, the rest on any that are in memory."""
        losses, staleness, memory = [], [], [*self.recent, *self.reservoir]
        if not self.gate:
            self.acceptance = acceptance_on(self.draft, trace, self.chain, self.places // 2).tolist()
        self.updates += 1
        self.unpublished += not self.gate or self.gate.ahead  # else the anchor goes on serving
        for step in range(steps):
            drawn = [memory[i] for i in torch.randperm(len(memory), generator=self.generator)]
            batch = (drawn if step else [trace, *drawn])[: self.batch]
            if step == 0:
                memory.append(trace)
            for example in batch:
                with replaying(example.ids.device):
                    loss = self.loss(example)
                (loss / len(batch)).backward()
                losses.append(loss.item())
                staleness.append(self.version - example.version)
            norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            if not norm.isfinite():
                self.diverged("the gradient is not finite", batch)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if not all(-1e6 < x < 1e6 for p in self.trained.values() for x in p.detach().aminmax()):  # NaN is neither
                self.diverged("the weights are past a million", batch)
            self.averaged += 1
            for name, p in self.trained.items():
                self.average[name].lerp_(p.detach(), max(1 / self.horizon, 3 / (self.averaged + 2)))
        return {"loss": losses[0], "staleness": sum(staleness) / len(staleness)}

    def diverged(self, why, traces):
        """Goes back to the average, which no such step has touched, so that what is saved can be gone on from; and forgets
        the step's traces, one of which may be to blame."""
        blamed = {id(trace) for trace in traces}
        self.recent = deque((t for t in self.recent if id(t) not in blamed), self.recent.maxlen)
        self.reservoir = [t for t in self.reservoir if id(t) not in blamed]
        self.go_back(self.average, self.averaged)
        raise UserError(f"learning diverged at update {self.updates}: {why}; lower --lr")

    def remember(self, trace):
        """The trace that is too old for `recent` gets its chance in the reservoir: each older one is there with the same."""
        if len(self.recent) == self.recent.maxlen and self.reservoir_size:
            self.older += 1
            place = len(self.reservoir) if len(self.reservoir) < self.reservoir_size else int(torch.randint(self.older, (), generator=self.generator))
            if place < self.reservoir_size:
                self.reservoir[place : place + 1] = [self.recent[0]]
        self.recent.append(trace)

    def publish(self):
        """The weights that serve from now on; a new version if others than the last."""
        if self.unpublished:
            self.version, self.unpublished = self.version + 1, 0
        return self.draft.state_dict() | (self.anchor[0] if self.gate and not self.gate.ahead else self.average)

    def state(self):
        """What a resumed learner needs besides the published draft.  No trace: those are users' text."""
        return {"optimizers": [o.state_dict() for o in self.optimizers], "averaged": self.averaged, "updates": self.updates,
                "waiting": self.waiting, "version": self.version, "weights": {name: p.detach() for name, p in self.trained.items()}, "average": self.average,
                **{name: getattr(self, name) if self.gate else None for name in ("anchor", "fallback", "begun")}, "gate": vars(self.gate) if self.gate else None}

    @torch.no_grad()
    def restore(self, state):
        """What state() gave; or the version alone, if the rest was lost.  Raises KeyError if something else is missing."""
        self.version = state.get("version", 0)
        if len(state) > 1:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                rate = optimizer.param_groups[0]["lr"]  # this run's, not that of the run that was saved
                optimizer.load_state_dict(saved)
                optimizer.param_groups[0]["lr"] = rate
            for name, p in self.trained.items():
                p.copy_(state["weights"][name])
            for name, p in self.average.items():
                p.copy_(state["average"][name])
            self.updates, self.waiting, self.averaged = (state[name] for name in ("updates", "waiting", "averaged"))
            self.waiting = min(self.waiting, max(0, self.every - 1))  # another `every` must not make many steps of it
            if self.gate and state["gate"]:
                vars(self.gate).update(state["gate"])
                self.anchor, self.fallback, self.begun = (state[name] for name in ("anchor", "fallback", "begun"))
            elif self.gate:
                self.set_anchor()


# ---- python rl.py: the ladder on languages small enough to enumerate; python rl.py LOGS: as it went in earnest -------


def measured(estimator, seed, far=False, behaviour=None, V=4, K=3):
    """One rung on one random language, exactly: each of the V^K chains with its probability, under draft or "target".

    -> (3,) float64: of the estimator's mean, the cosine to grad L and its length in lengths of grad L; and the variance of
    a round over the square of that mean: how many rounds to average until noise and signal are equally long."""
    generator = torch.Generator().manual_seed(seed)
    draft, other = torch.randn(2, (V**K - 1) // (V - 1), V, generator=generator, dtype=torch.float64)  # a row a prefix
    draft, target = (2 * draft, 2 * other) if far else (draft, draft + 0.6 * other)
    chains = torch.cartesian_prod(*[torch.arange(V)] * K).view(-1, K)  # (V^K, K)
    prefix = torch.stack([(V**k - 1) // (V - 1) + chains[:, :k] @ V ** torch.arange(k) for k in range(K)], 1)  # (V^K, K)
    draft_logits, target_logits = draft[prefix].requires_grad_(), target[prefix]  # (V^K, K, V)
    draft_q, target_p = (z.softmax(-1).gather(-1, chains[..., None])[..., 0] for z in (draft_logits, target_logits))
    accepted = torch.minimum(draft_q, target_p).cumprod(1) / V ** torch.arange(K - 1, -1, -1)  # j tokens begin V^(K-j) chains
    loss = policy_gradient_loss(draft_logits, target_logits, chains, 1.0, estimator, behaviour)
    exact, each = (torch.autograd.grad(x, draft_logits, retain_graph=True)[0] for x in (accepted.sum(), -len(chains) * loss))
    chance = (target_p if behaviour == "target" else draft_q).detach().prod(1)[:, None, None]
    exact, mean = (torch.zeros_like(draft).index_add(0, prefix.flatten(), g.flatten(0, 1)) for g in (exact, chance * each))
    square, length = (chance * each**2).sum(), mean.norm()
    return torch.stack([(mean * exact).sum() / (length * exact.norm()), length / exact.norm(), square / length**2 - 1])


def toy(languages=20):
    print(f"""What the estimators make of the exact gradient of the expected accepted tokens, on {languages} random languages of 4 tokens,
chains of 3: median, and half the distance between the quartiles.  near: the target's logits are the draft's and 0.6 noise;
far: independent and sharp.  cosine, length: of the mean, 1 and 1 if unbiased.  noise: variance of a round over the square
of that mean, for tokens that the draft drew; noise*: that the target drew.
""")
    columns = "near cosine", "length", "noise", "noise*", "far cosine", "length", "noise", "noise*"
    print(f"{'':18s}", *(f"{name:>12s}" for name in columns), sep="")
    for estimator in ESTIMATORS:
        cells = []
        for far, behaviour in itertools.product((False, True), (None, "target")):
            values = torch.stack([measured(estimator, seed, far, behaviour) for seed in range(languages)], 1)
            cells += values[2:] if behaviour else values  # the mean is the same on both sides; kl's, which has no S, nearly
        low, middle, high = torch.stack(cells).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=1).tolist()
        print(f"{estimator:18s}", *(f"{f'{m:.2f}±{(h - l) / 2:.2f}':>12s}" for l, m, h in zip(low, middle, high)), sep="")
    print("", *(f"{estimator:20s}{what}" for estimator, what in ESTIMATORS.items()), sep="\n")


def in_earnest(logs, picture):
    """Of `aurora.py --log NAME-SEED.jsonl`: tokens a round on held-out answers, a row a NAME, its seeds' mean and deviation."""
    runs = {}
    for log in sorted(map(Path, logs)):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lengths = [list(line["held_out"].values()) for line in lines if line["arm"] == "online" and "held_out" in line]
        if not lengths:
            raise UserError(f"{log} holds no examination of a draft: expected a --log of aurora.py with --held-out at least 1")
        runs.setdefault(log.stem.rpartition("-")[0] or log.stem, []).append(torch.tensor(lengths).mean(1))  # over classes
    runs = {name: torch.stack([c[: min(map(len, curves))] for c in curves]) for name, curves in runs.items()}  # (seeds, requests)
    shown = [-(-min(c.shape[1] for c in runs.values()) * i // 5) for i in range(1, 6)]
    print(f"{'after requests':20s}", *(f"{n:>12d}" for n in shown), "  seeds", sep="")
    for name, curves in sorted(runs.items(), key=lambda run: -run[1][:, -1].mean()):
        cells = [f"{x.mean():.2f}±{x.std(correction=len(x) > 1):.2f}" for x in curves[:, [n - 1 for n in shown]].T]
        print(f"{name:20s}", *(f"{cell:>12s}" for cell in cells), f"{len(curves):7d}", sep="")
    if picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 3.6), constrained_layout=True)
        for name, curves in runs.items():
            requests = range(1, curves.shape[1] + 1)
            mean, = axes.plot(requests, curves.mean(0), label=name, linewidth=2)
            for curve in curves:
                axes.plot(requests, curve, color=mean.get_color(), linewidth=0.6, alpha=0.7)
        axes.set(xlabel="requests served", ylabel="tokens a round, held-out answers")
        axes.legend()
        figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the ladder on languages small enough to enumerate or, given logs, as it went in earnest")
    parser.add_argument("logs", nargs="*", metavar="NAME-SEED.jsonl", help="what aurora.py --log wrote, of several estimators and seeds")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the logs (needs matplotlib)")
    args = parser.parse_args()
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install -r requirements-plot.txt")
    if args.plot and not args.logs:
        parser.error("--plot draws logs: name some")
    try:
        in_earnest(args.logs, args.plot) if args.logs else toy()
    except (UserError, OSError, ValueError, KeyError) as error:
        parser.error(f"not a --log of aurora.py: {error}")
