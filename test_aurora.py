"""The theorems, as tests.  `pytest -q`; what belongs to one component alone stands in tests/.

Statistical tests draw with fixed seeds, so they do not flicker; were the seed drawn anew, each
chi-square below would raise a false alarm with probability 1e-6.  Models are tiny and random.
"""

import itertools
from collections import Counter

import pytest
import torch

from aurora import Arm, aurora
from draft import Draft
from learner import Learner, expected_length
from memory import Memory
from model import TargetHead
from rl import policy_gradient_loss
from support.accept_torch import accept_torch
from support.background import Background
from support.draft_length import HEAD, REQUEST, SHARED, FixedLength, Plan
from support.sampling import inverse_cdf, probabilities
from support.trace import of_rounds
from tests.tiny import (
    assert_law, language, play, request, tiny_draft, tiny_target, uniforms,
)
from verify import RULES, NoDistribution, accept, accept_one

torch.set_num_threads(1)


# ---- the acceptance rules ------------------------------------------------------------------------

V = 8
DRAFTS = {  # logits of adversarial drafts against a target with logits z
    "another": lambda z: torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).double(),
    "equal": lambda z: z.clone(),
    "uniform": torch.zeros_like,
    "opposed": lambda z: -2 * z.clamp(min=-5),
    "nearly one-hot": lambda z: 30 * torch.nn.functional.one_hot(z.argmin(-1), V).double(),
    "half impossible": lambda z: z.masked_fill(torch.arange(V) % 2 == 0, float("-inf")),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("K", [1, 4])
def test_the_first_token_follows_the_target(name, K, rule, B=30_000):
    """Lossless, whatever the draft, at every temperature (rows of one batch at different ones): the
    first token that is emitted, by whatever route, has law target_p.  Chains end early by a rule on
    drafted tokens: after a token that is divisible by 3."""
    g = torch.Generator().manual_seed(K)
    target = 1.5 * torch.randn(K + 1, V, generator=g).double()
    target[0, 3] = float("-inf")
    draft = DRAFTS[name](target[:K])
    temperature = torch.tensor([0.5, 1.0, 1.7], dtype=torch.float64).repeat(B // 3)
    rows = draft.expand(B, K, V), target.expand(B, K + 1, V)
    u = uniforms(B, 2 * K + 1, seed=K)
    tokens = inverse_cdf(probabilities(rows[0], temperature[:, None]), u[:, :K])
    ended = (tokens % 3 == 0).cumsum(1) - (tokens % 3 == 0).long() > 0
    tokens = tokens.masked_fill(ended, -1)
    n, following = accept(rows[1], rows[0], tokens, u[:, K:], temperature, rule)
    emitted = torch.where(n > 0, tokens[:, 0], following)
    for t in (0.5, 1.0, 1.7):
        counts = torch.bincount(emitted[temperature == t], minlength=V)
        assert_law(counts, (target[0] / t).softmax(-1))


def draw(table, B, K, seed):
    """B chains of a language, token by token -> (B, K)."""
    u, rows = uniforms(B, K, seed=seed), [()] * B
    for k in range(K):
        logits = torch.stack([table[x] for x in rows])
        token = inverse_cdf(logits.softmax(-1), u[:, k]).tolist()
        rows = [(*x, t) for x, t in zip(rows, token)]
    return rows


def along(table, chain, K):
    return torch.stack([table[tuple(chain[:k])] for k in range(K)])


@pytest.mark.parametrize("rule", RULES)
def test_joint_law_of_what_comes_out(rule, K=2, V=3, B=60_000):
    """An enumerable language in which every distribution depends on what came before: the tokens of
    a round, continued by the target where it ended early, have the target's joint law."""
    p, q = language(1, K, V, 1.5), language(2, K, V, 1.5)
    chain = draw(q, B, K, seed=3)
    target = torch.stack([along(p, x, K + 1) for x in chain])
    draft = torch.stack([along(q, x, K) for x in chain])
    n, following = accept(target, draft, torch.tensor(chain), uniforms(B, K + 1, seed=4), 1.0, rule)
    u, seen = uniforms(B, K + 1, seed=5), Counter()
    for b in range(B):
        text = (*chain[b][: n[b]], int(following[b]))
        while len(text) <= K:
            text = (*text, int(inverse_cdf(p[text].softmax(-1), u[b, len(text)])))
        seen[text] += 1
    texts = list(itertools.product(range(V), repeat=K + 1))
    law = [along(p, x, K + 1).softmax(-1)[range(K + 1), x].prod() for x in texts]
    assert_law([seen[x] for x in texts], torch.stack(law))


def kept_exactly(p, q, chain, rule):
    """P(n >= i | chain), i = 1..K, by the rules' formulas with coins integrated out."""
    K = len(chain)
    P, Q = along(p, chain, K + 1).softmax(-1), along(q, chain, K).softmax(-1)
    ratio = [float(P[i, x] / Q[i, x]) for i, x in enumerate(chain)]
    kept, w = [], 1.0
    for r in ratio:
        w = min(1.0, w * r) if rule == "block" else w * min(1.0, r)
        kept.append(w)
    return kept


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_prefix_is_kept_with_its_weight(rule, seed, K=3, V=3, B=40_000):
    """P(n >= i | x_1..x_i) = w_i (block) or the product of min(1, p/q) (token), for every prefix of
    every length.  Each prefix is a binomial test at 5 standard errors; of 39 a false alarm has
    probability 3e-5."""
    p, q = language(10 + seed, K, V), language(20 + seed, K, V)
    chain = draw(q, B, K, seed)
    target = torch.stack([along(p, x, K + 1) for x in chain])
    draft = torch.stack([along(q, x, K) for x in chain])
    n, _ = accept(target, draft, torch.tensor(chain), uniforms(B, K + 1, seed=9), 1.0, rule)
    drawn, kept, weight = Counter(), Counter(), {}
    for x, length in zip(chain, n.tolist()):
        w = kept_exactly(p, q, x, rule) if x not in weight else weight[x]
        weight[x] = w
        for i in range(1, K + 1):
            weight[x[:i]] = w if i == K else w[i - 1]
            drawn[x[:i]] += 1
            kept[x[:i]] += length >= i
    for x, count in drawn.items():
        w = weight[x][-1] if len(x) == K else weight[x]
        error = max(1.0, (w * (1 - w) * count) ** 0.5)
        assert abs(kept[x] - w * count) < 5 * error, (x, kept[x], w * count)


def test_the_block_rule_keeps_more_on_every_language(K=3, V=3):
    """E[n] by enumeration: block >= token on 30 random languages, strictly more on some."""
    gains = []
    for seed in range(30):
        p, q = language(seed, K, V), language(100 + seed, K, V)
        expected = {rule: 0.0 for rule in RULES}
        for x in itertools.product(range(V), repeat=K):
            chance = float(along(q, x, K).softmax(-1)[range(K), x].prod())
            for rule in RULES:
                expected[rule] += chance * sum(kept_exactly(p, q, x, rule))
        gains.append(expected["block"] - expected["token"])
    assert min(gains) > -1e-12 and max(gains) > 0.02


@pytest.mark.parametrize("rule", RULES)
def test_the_batch_decides_as_the_definition(rule, B=400, K=4, V=5):
    """Every row of accept_torch, ragged ones and outright proposals too, is accept_one."""
    g = torch.Generator().manual_seed(1)
    target = torch.randn(B, K + 1, V, generator=g).double()
    draft = target[:, :K] + 0.8 * torch.randn(B, K, V, generator=g).double()
    tokens = inverse_cdf(draft.softmax(-1), uniforms(B, K, seed=2))
    length = torch.randint(0, K + 1, (B,), generator=g)
    tokens = tokens.masked_fill(torch.arange(K) >= length[:, None], -1)
    coins, one = uniforms(B, K + 1, seed=3), torch.ones(B).double()
    for logits in (draft, None):
        n, following, status = accept_torch(target, logits, tokens, coins, one, rule == "block")
        assert not status.any()
        for b in range(B):
            k = length[b]
            outright = torch.nn.functional.one_hot(tokens[b, :k], V).double()
            draft_q = outright if logits is None else draft[b, :k].softmax(-1)
            own = torch.cat([coins[b, :k], coins[b, K:]])
            wanted = accept_one(target[b, : k + 1].softmax(-1), draft_q, tokens[b, :k], own, rule)
            assert (int(n[b]), int(following[b])) == wanted


@pytest.mark.parametrize("rule", RULES)
def test_greedy_keeps_while_the_draft_is_the_argmax(rule):
    target = torch.tensor([[0.0, 1, 2], [2, 1, 0], [0, 2, 1]]).double().expand(4, 3, 3)
    tokens = torch.tensor([[2, 0], [2, 1], [0, 0], [2, -1]])
    n, following = accept(target, torch.zeros(4, 2, 3), tokens, uniforms(4, 3), 0.0, rule)
    assert n.tolist() == [2, 1, 0, 1] and following.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_decided_is_refused(rule):
    """A coin of 0 keeps nothing impossible; NaN raises where it is read: behind a rejection by the
    block rule alone; a pad within a chain, an id or a coin out of range are refused."""
    target, draft = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)
    tokens, coins = torch.tensor([[0, 1]]), torch.zeros(1, 3).double()
    impossible = target.clone()
    impossible[0, 0, 0] = float("-inf")
    n, following = accept(impossible, draft, tokens, coins, 1.0, rule)
    assert n.item() == 0 and following.item() != 0
    broken = impossible.clone()
    broken[0, 1, 2] = float("nan")
    if rule == "block":
        with pytest.raises(NoDistribution):
            accept(broken, draft, tokens, coins, 1.0, rule)
    else:
        assert accept(broken, draft, tokens, coins, 1.0, rule)[0].item() == 0
    bad = [
        (torch.tensor([[-1, 1]]), coins), (torch.tensor([[4, 1]]), coins), (tokens, coins + 1),
        (tokens, coins * float("nan")), (tokens[:, :1], coins),
    ]
    for ids, chances in bad:
        with pytest.raises(ValueError):
            accept(target, draft, ids, chances, 1.0, rule)


# ---- rounds: caches, rollback, rows --------------------------------------------------------------


class Changing:
    """Another source and length every round; chains that end where the draft is not sure."""

    def __init__(self, *plans):
        self.plans = itertools.cycle(plans)

    def choose(self, guesses):
        return next(self.plans)


def head(K, floor=0.0):
    return Plan(HEAD, K, [floor] * K)


LAWS = (Plan(),), (head(3),), (Plan(REQUEST, 3),), (Plan(SHARED, 3), head(2))
MIXED = head(3), Plan(), Plan(REQUEST, 4), head(4, 0.3), Plan(), Plan(SHARED, 3), head(1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plans", [(head(1),), (head(4),), MIXED], ids=["1", "4", "mixed"])
def test_greedy_speculative_equals_greedy_plain(plans, rule):
    """Token for token, in float64, so rollback equals recomputing: whatever was drafted by whom,
    kept or rejected, after rounds without a draft, with a memory that is right or one that lies."""
    target = tiny_target(gain=2.0, dtype=torch.float64)
    draft = tiny_draft(target)
    accepted = set()
    for seed in range(4):
        r = request(seed=seed, temperature=0.0, new=50)
        plain, _ = play(target, None, [r], FixedLength(0))
        lies = Memory(2000)
        lies.remember([(3 * t + 1) % 16 if i % 5 == 4 else t for i, t in enumerate(plain.text[0])])
        fast, _ = play(target, draft, [r], Changing(*plans), True, lies, rule)
        assert fast.text == plain.text
        accepted |= {x.accepted for x in fast.rounds[0]}
    assert len(accepted) > 1, "rounds of one length only: nothing was tested"


def test_a_row_alone_equals_a_row_in_a_batch():
    """In float64: rows of other prompts, lengths and temperatures change nothing."""
    target = tiny_target(gain=2.0, dtype=torch.float64)
    draft = tiny_draft(target)
    temperatures = 0.0, 0.7, 1.0, 1.3
    requests = [request(4 + 5 * i, 31 - 5 * i, i, temperatures[i]) for i in range(4)]
    plans = head(4), head(4, 0.2), Plan(), Plan(REQUEST, 3)
    batch, _ = play(target, draft, requests, Changing(*plans), own_memory=True)
    for b, r in enumerate(requests):
        alone, _ = play(target, draft, [r], Changing(*plans), own_memory=True)
        assert batch.text[b] == alone.text[0]
        assert len(alone.answer()) == r.max_new_tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plans", LAWS, ids=["none", "head", "this text", "all texts"])
def test_law_of_generated_text_is_the_targets(plans, rule, B=4000):
    """Whole path: prompt -> rounds -> text.  The joint law of the first three tokens against the
    target's own probabilities, multiplied out over all 4^3 continuations; with a shared memory of
    adversarial text, in which the likeliest continuation is never what follows."""
    target = tiny_target(gain=2.0, vocab_size=5, bos_token_id=4, suppress_tokens=(4,))
    draft, prompt = tiny_draft(target), [4, 1, 2, 0, 3, 1, 2, 0]
    shared = Memory(1000)
    shared.remember([1, 2, 0, 0, 3, 0, 1, 1, 2, 0, 1, 2, 1, 2, 0, 1, 3, 1])
    requests = [request(7, 3, seed, 0.8) for seed in range(B)]
    for r in requests:
        r.prompt = prompt
    run, rounds = play(target, draft, requests, Changing(*plans), True, shared, rule)
    assert {x.source for row in run.rounds for x in row if x.drafted} == {
        plan.source for plan in plans if plan.K
    }
    counts = Counter(tuple(ids[8:]) for ids in run.text)
    texts = list(itertools.product(range(4), repeat=3))
    with torch.no_grad():
        hidden, _ = target(torch.tensor([prompt + list(x) for x in texts]))
        log_p = (target.logits(hidden).double() / 0.8).log_softmax(-1)[:, 7:10]
    law = log_p.gather(-1, torch.tensor(texts)[..., None]).sum((1, 2)).exp()
    assert_law([counts[x] for x in texts], law)


@pytest.mark.parametrize("pruned", [False, True])
def test_replay_is_what_served(pruned):
    """The learner's gradient is that of the policy that served: the same logits to 1e-5 in float32,
    after rejections, silent rounds and rounds of the memory, in a batch, and so the same
    log-probabilities."""
    target = tiny_target()
    vocabulary = torch.arange(0, 16, 2) if pruned else None
    draft = tiny_draft(target, vocabulary=vocabulary)
    requests = [request(3 + 8 * i, 40, i, (1.0, 0.7, 1.4)[i]) for i in range(3)]
    run, _ = play(target, draft, requests, Changing(*MIXED), own_memory=True)
    for b in range(3):
        trace = run.trace(b)
        rounds = trace.drafted().nonzero()[:, 0]
        logits, target_logits, tokens = of_rounds(trace, draft, TargetHead(target), rounds)
        log_q = (logits / trace.temperature).log_softmax(-1)
        log_q = log_q.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)
        real = tokens >= 0
        assert real.sum() > 10
        served = trace.behaviour[rounds]
        torch.testing.assert_close(log_q[real], served[real], atol=1e-5, rtol=0)
        kept = torch.tensor([run.rounds[b][int(i)].accepted for i in rounds])
        assert len(kept.unique()) > 1


def test_a_trace_holds_what_the_target_said():
    """Its rows are the target's own, on the answer and off the path; its features those of the
    text."""
    target = tiny_target(dtype=torch.float64)
    run, rounds = play(target, tiny_draft(target), [request(new=30)], Changing(*MIXED), True)
    trace = run.trace()
    with torch.no_grad():
        hidden, features = target(trace.ids[None, :-1])
    torch.testing.assert_close(features[0], trace.features)
    torch.testing.assert_close(hidden[0, trace.prompt_length - 1 :], trace.answer_hidden())
    checked = 0
    for i, drafted in enumerate(rounds):
        tokens = [t for t in drafted.tokens[0].tolist() if t >= 0]
        if drafted.source == HEAD and tokens:
            start = int(trace.starts[i]) + 2
            text = torch.tensor([*trace.ids[:start].tolist(), *tokens])
            with torch.no_grad():
                hidden, _ = target(text[None])
            said = trace.hidden[i, : len(tokens) + 1]
            torch.testing.assert_close(hidden[0, start - 1 :], said)
            checked += 1
    assert checked > 3


# ---- the gradient --------------------------------------------------------------------------------


def enumerated(p, q, b, name, rule, behaviour, K=3, V=3):
    """The estimator's mean over every chain drawn from the language b, and autograd of the
    enumerated objective L = sum_j sum_x u_j, both as gradients of q's logits."""
    q = {x: z.detach().clone().requires_grad_() for x, z in q.items() if len(x) < K}
    leaves, mean, L = list(q.values()), None, 0.0
    for x in itertools.product(range(V), repeat=K):
        ids = torch.tensor([x])
        log_b = along(b, x, K).log_softmax(-1)[range(K), x]
        said = log_b[None] if behaviour == "old" else behaviour
        loss = policy_gradient_loss(
            along(q, x, K)[None], along(p, x, K)[None], ids, 1.0, name, said, rule)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        part = torch.stack([torch.zeros(V).double() if g is None else -g for g in grads])
        mean = part * log_b.sum().exp() + (0 if mean is None else mean)
        P, Q = along(p, x, K).softmax(-1)[range(K), x], along(q, x, K).softmax(-1)[range(K), x]
        u, drawn = torch.ones(()).double(), torch.ones(()).double()
        for j in range(K):
            drawn = drawn * Q[j]
            u = torch.minimum(drawn if rule == "block" else u * Q[j], u * P[j])
            L = L + u / V ** (K - 1 - j)  # a prefix begins V^(K-1-j) chains
    exact = torch.autograd.grad(L, leaves, allow_unused=True)
    zero = torch.zeros(V).double()
    return mean, torch.stack([zero if g is None else g for g in exact])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_unbiased_by_enumeration(rule, seed):
    """Every chain weighed by its probability, the loss taken at R = 1: autograd of the enumerated
    objective to 1e-12, for tokens of the draft as it is, as it was, and of the target.  The
    textbook's is not, whoever drew the tokens."""
    p, q, old = language(30 + seed), language(10 + seed), language(50 + seed, scale=0.5)
    p = {x: q[x] + 0.6 * z for x, z in p.items()}  # a good draft's target
    for b, behaviour in ((q, "draft"), (q, "old"), (old, "old"), (p, "target")):
        for name in ("reinforce", "expected"):
            mean, exact = enumerated(p, q, b, name, rule, behaviour)
            torch.testing.assert_close(mean, exact, atol=1e-12, rtol=0, msg=f"{name} {behaviour}")
        mean, exact = enumerated(p, q, b, "reinforce_textbook", rule, behaviour)
        cosine = torch.cosine_similarity(mean.flatten(), exact.flatten(), dim=0)
        assert cosine < 0.9 and (mean - exact).abs().max() > 1e-3


def test_the_rules_have_different_gradients():
    """An estimator that mistook one rule for the other would not be unbiased."""
    p, q = language(30), language(10)
    _, block = enumerated(p, q, q, "expected", "block", "draft")
    _, token = enumerated(p, q, q, "expected", "token", "draft")
    assert (block - token).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["log", "kl"])
@pytest.mark.parametrize("rule", RULES)
def test_the_other_utilities_have_the_same_best_draft(name, rule):
    """log and kl are no estimates of this gradient, but are best, 0, at q = p, where L is too."""
    p = language(3)
    for seed in (3, 4, 5):
        q, worst = p if seed == 3 else language(seed), 0.0
        for x in itertools.product(range(3), repeat=3):
            ids = torch.tensor([x])
            logits = along(q, x, 3)[None], along(p, x, 3)[None]
            loss = policy_gradient_loss(*logits, ids, 1.0, name, "target", rule).item()
            worst = max(worst, loss)
        assert (worst < 1e-12) if q is p else (worst > 1e-3)


# ---- learning ------------------------------------------------------------------------------------


def teachable(gain=2.0):
    """A target whose next token hangs mostly on the last one, which 20 requests can teach."""
    target = tiny_target(gain=gain)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return target


@pytest.mark.parametrize("learn_from, temperature, precision", [
    ("target", 0.7, torch.float32), ("target", 0.7, torch.bfloat16), ("both", 0.7, torch.float32),
    ("target", 0, torch.float32),
])
def test_serving_teaches_the_draft(learn_from, temperature, precision):
    """20 requests, then 8 held-out answers: the accepted tokens to expect have grown by 30 %."""
    target = teachable()
    torch.manual_seed(0)
    draft, head_of_target, held = Draft(target), TargetHead(target), []
    for i in range(8):
        r = request(seed=1000 + i, new=48, temperature=temperature)
        held.append(play(target, None, [r], FixedLength(0))[0].trace())
    learner = Learner(draft, head_of_target, lr=0.05, every=48, chain=3, learn_from=learn_from,
                      fresh=True, precision=precision)
    served = draft.clone()

    def accepted():
        lengths = [expected_length(served, x, head_of_target, 3, "block") for x in held]
        return sum(lengths) / len(lengths) - 1

    before = accepted()
    for seed in range(20):
        r = request(seed=seed, new=48, temperature=temperature)
        trace = play(target, served, [r], FixedLength(3))[0].trace()
        outcome = learner.update(trace)
        if outcome.weights:
            served.load_state_dict(outcome.weights)
    assert accepted() > 1.3 * before + 0.02, (before, accepted())


def test_what_was_learned_serves_from_the_next_request_on():
    """A push changes the weights that draft, one answer behind, and nothing but a push does."""
    target = teachable()
    torch.manual_seed(0)
    draft = Draft(target)
    learner = Background(Learner(draft, TargetHead(target), every=24, gate=False), process=False)
    arm = Arm(draft.clone(), FixedLength(3))
    seen, before = [], arm.draft.fc.weight.clone()
    for served in aurora(target, arm, learner, [request(seed=i, new=24) for i in range(4)]):
        seen.append((served.version, arm.version))
        if served.outcome:
            for name, weights in learner.learner.serves.state_dict().items():
                assert torch.equal(arm.draft.state_dict()[name], weights)
        else:
            assert torch.equal(arm.draft.fc.weight, before)
    assert seen == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert not torch.equal(arm.draft.fc.weight, before)
    learner.close()


@pytest.mark.parametrize("process", [False, True])
def test_the_background_changes_nothing(process):
    """Learned on another core, an answer behind, is learned bit for bit as here."""
    target = teachable()
    torch.manual_seed(0)
    draft = Draft(target)
    traces = []
    for seed in range(4):
        r = request(seed=seed, new=24)
        traces.append(play(target, draft, [r], FixedLength(3))[0].trace())
    here = Learner(draft.clone(), TargetHead(target), every=24, fresh=True)
    outcomes = [here.update(trace) for trace in traces]
    assert all(outcome.loss for outcome in outcomes)
    there = Background(Learner(draft.clone(), TargetHead(target), every=24, fresh=True), process)
    assert there.result() is None
    for trace, wanted in zip(traces, outcomes):
        there.submit(trace)
        got = there.result()
        assert (got.loss, got.version) == (wanted.loss, wanted.version)
    state = there.close()
    for name, weights in here.state()["average"].items():
        assert torch.equal(weights, state["average"][name])
