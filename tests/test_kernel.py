"""kernels.cu decides as verify.accept_torch does, by both rules, on whatever is thrown at it.

The two compute the same in different precision, so they may differ only where a coin lies within
rounding of a boundary; `misplaced` measures how far a coin would have to move, in probability.
Letters: B batch rows, K drafted tokens, V vocabulary, T temperature.
"""

import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.build import kernel, load_kernel
from support.sampling import inverse_cdf, probabilities
from verify import NoDistribution, accept, accept_torch

HOME = Path(__file__).parent.parent
RULES = [pytest.param(True, id="block"), pytest.param(False, id="token")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 31, 256, 257, 1000, 4097, 32000, 50257, 151936]
NAN, INF = float("nan"), float("inf")
BELOW_ONE = 1 - 2**-53  # the largest coin
ROUNDING = 3e-7  # of a probability made of float32 exponentials; a w is a product of K quotients


@pytest.fixture(scope="session")
def fused():
    """The operator for the CPU: (target, draft, tokens, coins, temperature, block) -> kept, next
    token, status."""
    if not kernel("cpu"):
        pytest.skip("no kernel here: no compiler, no ninja, or AURORA_KERNEL=torch")
    return kernel("cpu")


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


# What is decided.


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decides_as_torch_does(fused, dtype, V, block):
    for seed in range(8 if V < 5000 else 1):
        K, B = (1 + seed, 6) if V < 5000 else (4, 3)
        case = some_round(V, dtype, B, K, seed)
        assert_decided(fused, case, block)
        assert_decided(fused, proposed_outright(case), block)


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_decides_alike_along_chains_of_every_kind(fused, noise, block):
    """Good drafts and bad ones, up to 8 tokens long, 600 chains each; and some of 300 tokens."""
    for seed in range(5):
        case = some_round(61, B=120, K=8, seed=100 + seed, noise=noise)
        assert_decided(fused, case, block)
        assert_decided(fused, proposed_outright(case), block)
    assert_decided(fused, some_round(61, K=300, noise=0.01 * noise), block)


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("outright", [False, True])
def test_what_comes_out_follows_the_target(fused, outright, block):
    """400,000 chains of 2 tokens over 3 ids, finished from the target: the counts of the 27 answers
    against their probabilities, by chi-square with 26 degrees of freedom.  Over seeds it would
    raise a false alarm with probability 1e-6 (the limit is that quantile, 75.5)."""
    B, K, V = 400_000, 2, 3
    target_p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]).double()
    draft_q = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]).double()
    coins = uniforms(B, 3 * K + 2)
    tokens = inverse_cdf(draft_q.expand(B, K, V), coins[:, :K])
    logits = [p.log().float().expand(B, -1, V) for p in (target_p, draft_q)]
    if outright:  # any rule will do for what is proposed: the ids 1, 2
        tokens, logits[1] = torch.tensor([1, 2]).expand(B, K), None
    kept, token, _ = fused(*logits, tokens, coins[:, K : 2 * K + 1], torch.ones(B).double(), block)
    answer = inverse_cdf(target_p.expand(B, K + 1, V), coins[:, 2 * K + 1 :])
    place = torch.arange(K + 1)
    drafted = torch.nn.functional.pad(tokens, (0, 1))
    answer = torch.where(place < kept[:, None], drafted, answer)
    answer = torch.where(place == kept[:, None], token[:, None], answer)
    counts = torch.bincount(answer @ torch.tensor([9, 3, 1]), minlength=27)
    expected = B * torch.einsum("a,b,c->abc", *target_p).flatten()
    assert ((counts - expected) ** 2 / expected).sum() < 75.5


@pytest.mark.parametrize("block", RULES)
def test_greedy_keeps_the_first_argmax_whatever_the_coins_and_the_rule(fused, block):
    """Small whole logits, so that most rows have several ids at the top."""
    g = torch.Generator().manual_seed(0)
    for V in (3, 20, 1000):
        target = torch.randint(3, (50, 5, V), generator=g).float()
        tokens = target.argmax(-1)[:, :4]
        elsewhere = torch.rand(50, 4, generator=g) < 0.3
        tokens = torch.where(elsewhere, torch.randint(V, (50, 4), generator=g), tokens)
        for draft in (None, torch.full((50, 4, V), NAN)):  # greedy: not looked at
            case = target, draft, tokens, uniforms(50, 5), torch.zeros(50).double()
            kept, token, status = fused(*case, block)
            agreed = (tokens == target.argmax(-1)[:, :4]).long().cumprod(1).sum(1)
            assert torch.equal(kept, agreed) and status.eq(0).all()
            assert torch.equal(token, target.argmax(-1)[torch.arange(50), agreed])
            minus = fused(*case[:4], -case[4], block)
            assert_same(minus, (kept, token, status))


def test_a_coin_on_a_boundary_keeps_nothing(fused):
    """Two tokens of a draft on ids 0 and 1, each 1/2.  The target's first row is 1/4 on each of 4
    ids, so w_1 = 1/2; its second is 1/2 on ids 2 and 3, so m_1 = 1/2 and h_1 = 1/2, w_2 = 0."""
    target = torch.zeros(1, 3, 4)
    target[0, 1, :2] = -INF
    draft = torch.zeros(1, 2, 4)
    draft[..., 2:] = -INF
    tokens = torch.tensor([[0, 1]])
    one = torch.ones(1).double()
    for block, coin in itertools.product((True, False), (0.5, 0.5 - 2**-54)):
        coins = torch.tensor([[coin, 0.0, 0.5]], dtype=torch.float64)
        n, _, _ = fused(target, draft, tokens, coins, one, block)
        assert n.item() == (coin < 0.5)
        n, _, _ = fused(target[:, :2], draft[:, :1], tokens[:, :1], coins[:, [0, 2]], one, block)
        assert n.item() == (coin < 0.5)  # and with w_1 at the end of the chain


@pytest.mark.parametrize("V", [4, 1024, 65536])
def test_a_coin_on_a_boundary_draws_the_id_above(fused, V):
    """V equal ids, V a power of two, so that every boundary i/V is exact."""
    i = torch.arange(0, V, max(1, V // 64))
    target, none = torch.zeros(1, 1, V).expand(len(i), 1, V), torch.empty(len(i), 0).long()
    for block in (True, False):
        one = torch.ones(len(i)).double()
        assert torch.equal(fused(target, None, none, (i / V).double()[:, None], one, block)[1], i)


@pytest.mark.parametrize("block", RULES)
def test_takes_a_draft_of_another_dtype(fused, block):
    for a, b in itertools.permutations(DTYPES, 2):
        target, draft, *rest = some_round(257)
        assert_decided(fused, (target.to(a), draft.to(b), *rest), block)


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_draft_that_is_nearly_the_target(fused, noise, block):
    """w target_p - draft_q is then the difference of nearly equal numbers; with none, it is empty
    for w = 1.  Coins are near 1, as else all is kept."""
    for seed in range(20):
        target, draft, _, coins, temperature = some_round(1000, noise=noise, seed=seed)
        draft = draft.where(target[:, :-1] > -INF, -INF)
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 1000, coins[:, 1:].shape, generator=g)
        coins[:, :-1] = (1 - 1e-3 * coins[:, :-1]).clamp(max=BELOW_ONE)
        case = target, draft, tokens, coins, temperature
        kept, token, status = fused(*case, block)
        read = status == 0
        assert torch.equal(status, accept_torch(*case, block)[2]) and read.sum() > 2
        assert (misplaced(case, block, kept, token)[read] < 3 * ROUNDING).all()


@pytest.mark.parametrize("block", RULES)
def test_the_residual_of_equal_rows_is_empty(fused, block):
    """p - q is 0 then, not what a fused multiply-add leaves of it: target_p as a whole is drawn
    from.  The token is impossible, so that it is not kept."""
    row = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    row[5] = -INF
    target, tokens = row.expand(200, 2, 1000), torch.full((200, 1), 5)
    temperature = torch.linspace(0.2, 2, 200).double()
    case = target, target[:, :1], tokens, uniforms(200, 2), temperature, block
    decision = fused(*case)
    assert decision[0].eq(0).all() and decision[1].unique().numel() > 20
    assert_same(decision, accept_torch(*case))


@pytest.mark.parametrize("block", RULES)
def test_draws_the_tail_of_a_residual_at_its_rate(fused, block):
    """Beside a kept mass of 1, ids that target_p has over draft_q by 1e-7 and 2e-7: the coin's
    thirds draw them."""
    V = 200_000
    target, draft = torch.full((1, 2, V), -INF), torch.full((1, 1, V), -INF)
    target[0, 0, [7, 100, V - 1]] = torch.tensor([1.0, 1e-7, 2e-7]).log()
    target[0, 1, 0] = 0.0
    draft[0, 0, [7, 8]] = torch.tensor([1.0, 1e-8]).log()
    tokens, one = torch.tensor([[8]]), torch.ones(1).double()
    for coin, v in ((0.0, 100), (0.3333, 100), (0.3334, V - 1), (BELOW_ONE, V - 1)):
        coins = torch.tensor([[0.5, coin]], dtype=torch.float64)
        kept, token, _ = fused(target, draft, tokens, coins, one, block)
        assert (kept.item(), token.item()) == (0, v)


@pytest.mark.parametrize("block", RULES)
def test_adds_up_what_is_small(fused, block):
    """One id of weight 1 and 199,999 of 1e-8, which are 0.002 together and nothing to a float32 sum
    that holds the 1: whether that id is kept, and which is drawn, for coins 1e-6 to either side of
    its probability."""
    target = torch.full((4, 2, 200_000), 1e-8).log()
    target[:, :, 0] = 0.0
    p = 1 / (1 + 199_999 * torch.tensor(1e-8).log().double().exp().item())
    coins = [[p - 1e-6, 0.5], [p + 1e-6, 0.5], [0.5, p - 1e-6], [0.5, p + 1e-6]]
    coins, tokens = torch.tensor(coins, dtype=torch.float64), torch.zeros(4, 1).long()
    kept, token, _ = fused(target, None, tokens, coins, torch.ones(4).double(), block)
    assert kept.tolist() == [1, 0, 1, 1] and token[[0, 2]].tolist() == [0, 0]
    assert abs(token[1].item() - 100_000) < 10 and 90 < token[3].item() < 110


@pytest.mark.parametrize("block", RULES)
def test_divides_by_the_temperature_more_finely_than_float32(fused, block):
    """200,000 ids, all 12.2 below one, halve the probability; the temperature of 999 for which
    1 / T suffers most from float32, which would move it by 8e-8."""
    slope = 1 / torch.linspace(0.9, 1.1, 999).double() / math.log(2)
    worst = ((slope.float().double() - slope) / slope).argmax()
    T = (1 / slope[worst] / math.log(2)).expand(2)
    target = torch.full((2, 2, 200_000), -12.2)
    target[..., 0] = 0.0
    p = (target[0, 0].double() / T[0]).softmax(-1)[0].item()
    coins = torch.tensor([[p - 4e-8, 0.5], [p + 4e-8, 0.5]], dtype=torch.float64)
    kept, _, _ = fused(target, None, torch.zeros(2, 1).long(), coins, T, block)
    assert kept.tolist() == [1, 0]


@pytest.mark.parametrize("block", RULES)
def test_a_row_decides_alone_as_in_a_batch_and_on_two_threads_as_on_one(fused, block):
    case = some_round(32000, torch.bfloat16, B=12)
    one = fused(*case, block)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert_same(fused(*case, block), one)
    finally:
        torch.set_num_threads(threads)
    for b in range(12):
        alone = fused(*(x[b : b + 1] for x in case), block)
        assert_same(alone, [x[b : b + 1] for x in one])


# Where the numbers lie.


@pytest.mark.parametrize("block", RULES)
def test_reads_rows_of_any_stride(fused, block):
    """A pitch larger than V, a batch that is one row expanded, ids that do not lie side by side,
    sliced coins, and an odd address; what lies between the rows is NaN."""
    target, draft, tokens, coins, temperature = some_round(257)
    expected = fused(target, draft, tokens, coins, temperature, block)
    wide_target, wide_draft = torch.full((6, 4, 300), NAN), torch.full((6, 3, 300), NAN)
    wide_target[..., 3:260], wide_draft[..., 3:260] = target, draft
    wide_coins = torch.full((6, 9), 7.0, dtype=torch.float64)
    wide_coins[:, 1::2] = coins
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (target, draft)]
    for x, y, c in (
        (wide_target[..., 3:260], wide_draft[..., 3:260], coins),
        (target, draft, wide_coins[:, 1::2]),
        (*across, coins),
    ):
        assert_same(fused(x, y, tokens, c, temperature, block), expected)
    one = [x[:1].expand(x.shape) for x in (target, draft, tokens)]
    expected = fused(*(x.contiguous() for x in one), coins, temperature, block)
    assert_same(fused(*one, coins, temperature, block), expected)


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("strides", [(2**29, 2**30, 1), (2**31, 2**10, 1)])
def test_addresses_more_than_2_to_the_31_elements(fused, strides, block):
    """8 GB of addresses, of which a few pages are written.  All is kept, so every row is read."""
    try:
        room = torch.empty(2**32, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no room for 8 GB of addresses: {error}")
    target, _, _, coins, temperature = some_round(100, torch.bfloat16, B=2)
    coins[:, :3], temperature[:] = 0.0, 1.0
    rest = target[:, :3], torch.full((2, 3), 50), coins, temperature, block
    far = room.as_strided((2, 4, 100), strides).copy_(target)
    kept, token, status = fused(far, *rest)
    assert kept.tolist() == [3, 3]
    assert_same((kept, token, status), fused(target, *rest))


UNREADABLE = """
import ctypes, mmap, torch
from verify import accept
page = mmap.PAGESIZE
V = page // 4
def rows(*readable):  # (1, n, V) float32 zeros, a page each; to read another ends the process
    x = torch.frombuffer(mmap.mmap(-1, len(readable) * page), dtype=torch.float32)
    x = x.view(1, -1, V).zero_()
    for k, may in enumerate(readable):
        if not may:
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(x[0, k].data_ptr()), page, 0) == 0
    return x
def kept(target, draft, tokens, temperature=1.0, rule="block"):
    coins = torch.tensor([[0.0, 0.0, 0.0, 0.5]], dtype=torch.float64)
    return accept(target, draft, torch.tensor([tokens]), coins, temperature, rule)[0].item()
target = rows(1, 0, 0, 0)
target[0, 0, 5] = float("-inf")
assert kept(target, rows(1, 0, 0), [5, 5, 5], rule="token") == 0  # one row of each
assert kept(rows(1, 0, 0, 0), rows(0, 0, 0), [5, 5, 5], 0.0, rule="token") == 0  # greedy: no draft
for rule in ("token", "block"):
    assert kept(rows(1, 0, 0, 0), rows(0, 0, 0), [-1, -1, -1], rule=rule) == 0  # all pads: target_p
    assert kept(rows(1, 1, 1, 0), rows(1, 1, 0), [5, 5, -1], rule=rule) == 2  # to the chain's end
    assert kept(rows(1, 1, 1, 0), rows(0, 0, 0), [0, 0, -1], 0.0, rule=rule) == 2
print("done", flush=True)
kept(target, rows(1, 0, 0), [5, 5, 5])
print("the block rule read too little", flush=True)
"""


def test_reads_no_row_that_it_does_not_need(fused):
    """Rows after a rejection under the token rule, past a row's own chain, and a greedy draft's, on
    pages whose reading ends the process; as it does in the end, when the block rule reads all."""
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE], cwd=HOME, capture_output=True, text=True
    )
    assert done.stdout.split() == ["done"], done.stderr[-2000:]
    assert done.returncode < 0  # by a signal


# What is refused.


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("T", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_logits_without_a_distribution_are_reported_and_keep_nothing(fused, bad, T, block):
    target, draft, tokens, coins, _ = some_round(300, B=12)
    temperature = torch.full((12,), T).double()
    spoiled = target.clone()
    spoiled[::2, 0, 299] = bad
    coins.zero_()
    kept, _, status = fused(spoiled, draft, tokens, coins, temperature, block)
    assert status.tolist() == [4, 0] * 6 and kept[::2].eq(0).all()
    rule = "block" if block else "token"
    with pytest.raises(NoDistribution, match=r"without a distribution.*\[0, 2, 4, 6, 8, 10\]"):
        accept(spoiled, draft, tokens, coins, T, rule)
    spoiled = draft.clone()
    spoiled[:, 0, 299] = bad
    kept, _, status = fused(target, spoiled, tokens, coins, temperature, block)
    assert status.tolist() == [4 * (T > 0)] * 12 and (kept[status == 4] == 0).all()
    spoiled = target.clone()
    spoiled[:, 1, 299] = bad  # after a token that was kept, for some
    case = spoiled, None, tokens, coins, temperature, block
    kept, _, status = fused(*case)
    assert torch.equal(status, accept_torch(*case)[2]) and status.max() == 4
    assert kept[status == 4].eq(0).all()
    nothing = torch.full((1, 1, 300), -INF)
    with pytest.raises(NoDistribution, match="without a distribution"):
        accept(nothing, None, torch.empty(1, 0).long(), uniforms(1, 1), T, rule)


def test_what_is_broken_after_a_rejection_matters_to_the_block_rule_alone(fused):
    """The first of three tokens is impossible, the last is a pad: NaN row by row, beyond it."""
    V = 300
    tokens, coins = torch.tensor([[7, 7, -1]]), torch.tensor([[0.5, 0.5, 0.5, 0.5]]).double()
    target, draft = torch.zeros(1, 4, V), torch.zeros(1, 3, V)
    target[0, 0, 7] = -INF
    for place, broken in ((1, "target"), (2, "target"), (1, "draft")):
        rows = {"target": target.clone(), "draft": draft.clone()}
        rows[broken][0, place, 9] = NAN
        case = rows["target"], rows["draft"], tokens, coins
        assert accept(*case, rule="token")[0].item() == 0
        with pytest.raises(NoDistribution):
            accept(*case, rule="block")
    target[0, 3], draft[0, 2] = NAN, NAN  # beyond the row's own chain
    for rule in ("token", "block"):
        assert accept(target, draft, tokens, coins, rule=rule)[0].item() == 0


@pytest.mark.parametrize("block", RULES)
def test_refuses_what_acceptance_cannot_take(fused, block):
    """A row's status names the gravest fault, and the rows beside it are decided all the same."""
    tokens = {(-2, 0): 2, (31, 0): 2, (-1, 0): 2, (0, -1): 0, (30, -1): 0, (2**62, 0): 2}
    coins = {0.0: 0, BELOW_ONE: 0, 1.0: 1, -1e-300: 1, NAN: 1, INF: 1}
    temperatures = {0.0: 0, 1e-300: 0, 1e300: 0, -1e-300: 3, -1.0: 3, NAN: 3}
    faults = list(itertools.product(tokens, coins, temperatures))
    B = len(faults)
    x = torch.tensor([t for t, _, _ in faults])
    T = torch.tensor([t for _, _, t in faults], dtype=torch.float64)
    target = torch.randn(1, 3, 31, generator=torch.Generator().manual_seed(0)).expand(B, 3, 31)
    expected = []
    for of_tokens, of_coin, of_temperature in faults:
        found = tokens[of_tokens], coins[of_coin], temperatures[of_temperature]
        expected.append(min((s for s in found if s), default=0))
    for place in range(3):
        c = torch.full((B, 3), 0.437, dtype=torch.float64)
        c[:, place] = torch.tensor([coin for _, coin, _ in faults], dtype=torch.float64)
        decision = fused(target, None, x, c, T, block)
        reference = accept_torch(target, None, x, c, T, block)
        assert decision[2].tolist() == expected == reference[2].tolist()
        fine = decision[2] == 0
        assert_same([y[fine] for y in decision], [y[fine] for y in reference])
        assert decision[0][~fine].eq(0).all()


def test_the_operator_itself_lets_nobody_past_the_end(fused):
    target, draft, tokens, coins, temperature = some_round(300, B=12)
    for wrong in (
        [target[:, :3], draft], [target, draft[:, :2]], [target, draft[..., :299]],
        [target.double(), draft], [target, draft.double()], [target.transpose(0, 1), draft],
    ):
        with pytest.raises(RuntimeError, match="does not fit"):
            torch.ops.aurora.accept(*wrong, tokens, coins, temperature, True)
    for wrong in ([coins[:, 1:], temperature], [coins.float(), temperature], [coins, coins[:5, 0]]):
        with pytest.raises(RuntimeError, match="does not fit"):
            torch.ops.aurora.accept(target, draft, tokens, *wrong, True)
    across = target.transpose(1, 2).contiguous().transpose(1, 2)  # ids not side by side
    with pytest.raises(RuntimeError, match="does not fit"):
        torch.ops.aurora.accept(across, draft, tokens, coins, temperature, True)


# Teams of workers.

LOCKSTEP = """
#include <barrier>
#include <thread>

struct Lockstep {  // threads on every batch row; they meet at a board where each leaves its number
  static constexpr int W = 16;
  int64_t rank, size;
  double* board;
  std::barrier<>& gate;
  template <class Fold> double meet(double x, Fold fold) {
    board[rank] = x;
    gate.arrive_and_wait();
    double all = board[0];
    for (int64_t i = 1; i < size; i++) all = fold(all, board[i]);
    gate.arrive_and_wait();
    return all;
  }
  double max(double x) { return meet(x, [](double a, double b) { return a > b ? a : b; }); }
  void sum(double* x, int n) {
    for (int i = 0; i < n; i++) x[i] = meet(x[i], [](double a, double b) { return a + b; });
  }
};

int64_t team_size = 1;
void set_team(int64_t size) { team_size = size; }

void run(const Round& r, int) {
  std::vector<double> board(team_size);
  std::barrier<> gate(team_size);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < team_size; rank++)
    threads.emplace_back([&, rank] {
      Lockstep team{rank, team_size, board.data(), gate};
      for (int64_t b = 0; b < r.B; b++) decide(team, r, b);
      gate.arrive_and_drop();  // if they came to differ, the test is to fail and not to hang
    });
  for (auto& thread : threads) thread.join();
}
STABLE_TORCH_LIBRARY(aurora_lockstep, library) {
  library.def("set_team(int size) -> ()");
  library.def(
      "accept(Tensor target_logits, Tensor? draft_logits, Tensor draft_tokens, Tensor coins, "
      "Tensor temperature, bool block) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(aurora_lockstep, CompositeExplicitAutograd, library) {
  library.impl("set_team", TORCH_BOX(&set_team));
}
STABLE_TORCH_LIBRARY_IMPL(aurora_lockstep, CPU, library) {
  library.impl("accept", TORCH_BOX(&accept));
}
"""


@pytest.fixture(scope="module")
def lockstep(fused, tmp_path_factory):
    """The kernel's lines up to its teams, with a team of CPU threads in their place."""
    source = tmp_path_factory.mktemp("lockstep") / "lockstep.cu"
    algorithm, found, _ = (HOME / "kernels.cu").read_text().partition("#ifndef __CUDACC__")
    assert found
    source.write_text(algorithm + LOCKSTEP)
    load_kernel("cpu", source)
    return torch.ops.aurora_lockstep


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("team", [1, 2, 7])
@pytest.mark.parametrize("V", [1, 31, 1000, 20_000])
def test_decides_alike_whatever_the_team(lockstep, V, team, block):
    """Tiles of 16 ids, as on a GPU: a reduction that is forgotten, or a part of the row that nobody
    reads, shows."""
    lockstep.set_team(team)
    for seed in range(4):
        case = some_round(V, seed=seed)
        assert_decided(lockstep.accept, case, block)
        assert_decided(lockstep.accept, proposed_outright(case), block)


# As part of torch, and built.


@pytest.mark.parametrize("block", RULES)
def test_is_a_torch_operator(fused, block):
    target, draft, tokens, coins, temperature = some_round(31)
    rest = tokens, coins, temperature
    for arguments in (
        (target, draft, *rest, block),
        (target.requires_grad_(), None, *rest, block),
        (target[:0], draft[:0], *(x[:0] for x in rest), block),
    ):
        torch.library.opcheck(torch.ops.aurora.accept.default, arguments)

    def run(x):
        return torch.ops.aurora.accept(2 * x, draft, *rest, block)[1] + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(target), run(target))


WITHOUT_A_COMPILER = """
import os, warnings, torch
from support.build import kernel, load_kernel
from verify import accept
target, tokens = torch.zeros(1, 3, 31), torch.tensor([[4, 5]])
coins = torch.tensor([[0.0, 0.0, 0.5]], dtype=torch.float64)
for choice in ("", "torch", "fused", "magic"):
    os.environ["AURORA_KERNEL"] = choice
    kernel.cache_clear(), load_kernel.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            told = [accept(target, None, tokens, coins)[0].item() for _ in range(3)]
        except (RuntimeError, ValueError) as error:
            told = "AURORA_KERNEL" if "AURORA_KERNEL" in str(error) else type(error).__name__
    print(choice, told, sum("kernels.cu" in str(w.message) for w in caught))
"""


def test_without_a_compiler_torch_takes_over_with_one_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], cwd=HOME, capture_output=True, text=True,
        env=os.environ | {"PATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert done.stdout.splitlines() == [
        " [2, 2, 2] 1", "torch [2, 2, 2] 0", "fused RuntimeError 0", "magic AURORA_KERNEL 0",
    ], done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


def test_compiles_for_cuda(tmp_path):
    """Compiled, not run: nvcc for sm_80 and sm_90, against whatever build of torch is here."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on this machine")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    done = subprocess.run(
        ["nvcc", "-std=c++20", *architectures, "--threads", "2", "-Werror", "all-warnings",
         "-isystem", Path(torch.__file__).parent / "include", "-fmad=false",
         "-c", HOME / "kernels.cu", "-o", tmp_path / "kernels.o"],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("block", RULES)
    @pytest.mark.parametrize("V", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_decides_as_torch_does(self, dtype, V, block):
        assert kernel("cuda"), "not built"

        def decide(*case):
            there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in case]
            return [x.cpu() for x in kernel("cuda")(*there)]

        for seed in range(3):
            case = some_round(V, dtype, K=2 + 3 * seed, seed=seed)
            assert_decided(decide, case, block)
            assert_decided(decide, proposed_outright(case), block)

    @pytest.mark.parametrize("block", RULES)
    def test_can_be_captured_in_a_graph(self, block):
        assert kernel("cuda"), "not built"
        case = [x.cuda() for x in some_round(32000, torch.bfloat16)]
        first = torch.ops.aurora.accept(*case, block)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            second = torch.ops.aurora.accept(*case, block)
        graph.replay()
        assert_same(first, second)
