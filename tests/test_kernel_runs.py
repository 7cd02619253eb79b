"""Where kernels.cu runs: in teams of any size, as an operator of torch, with no compiler, on a GPU.

Letters: B batch rows, K drafted tokens, V vocabulary, T temperature.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.build import kernel, load_kernel

from .rounds import (
    assert_decided, assert_same, DTYPES, HOME, proposed_outright, RULES, SIZES, some_round,
)

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
from model import UserError
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
        except UserError as error:
            told = str(error)[:20]
    print(choice, told, sum("kernels.cu" in str(w.message) for w in caught))
"""


def test_without_a_compiler_torch_takes_over_with_one_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], cwd=HOME, capture_output=True, text=True,
        env=os.environ | {"PATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert done.stdout.splitlines() == [
        " [2, 2, 2] 1", "torch [2, 2, 2] 0", "fused AURORA_KERNEL=fused, 0",
        "magic AURORA_KERNEL must b 0",
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
