"""What kernels.cu reads: rows of any stride, however far apart, none in vain; and what it refuses.

Letters: B batch rows, K drafted tokens, V vocabulary, T temperature.
"""

import itertools
import subprocess
import sys

import pytest
import torch

from support.accept_torch import accept_torch
from verify import NoDistribution, accept

from .rounds import assert_same, BELOW_ONE, HOME, INF, NAN, RULES, some_round, uniforms

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
