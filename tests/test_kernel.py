"""kernels.cu decides as accept_torch does, by both rules, on whatever is thrown at it.

Letters: B batch rows, K drafted tokens, V vocabulary, T temperature.
"""

import itertools
import math

import pytest
import torch

from support.sampling import inverse_cdf
from support.accept_torch import accept_torch

from .rounds import (
    assert_decided, assert_same, BELOW_ONE, DTYPES, INF, misplaced, NAN, proposed_outright,
    ROUNDING, RULES, SIZES, some_round, uniforms,
)

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
