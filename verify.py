"""The acceptance rule of speculative decoding: how many drafted tokens to keep, and the token after them.

The draft proposed x_0..x_{K-1}, x_k drawn from draft_q_k.  The target, in one forward pass, says target_p_k
at each of those places and at the one after.  From left to right, keep x_k with probability
min(1, target_p_k(x_k) / draft_q_k(x_k)) and stop at the first that is not kept.  There, draw the next
token from the *residual*, max(0, target_p - draft_q) renormalised; if all were kept, draw it from
target_p_K, the bonus.  Why this is lossless: id v comes out with probability

    draft_q(v) min(1, target_p(v)/draft_q(v)) + (1 - overlap) residual(v)
    = min(target_p, draft_q)(v) + max(0, target_p - draft_q)(v) = target_p(v),

where overlap = sum_v min(target_p, draft_q)(v) is how often a drafted token is kept.
(Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318, theorem 1.)

For example, of two ids, draft_q = (0.9, 0.1) and target_p = (0.6, 0.4).  The first is drafted nine times in ten and kept
with probability 0.6 / 0.9, so it comes out with 0.6.  The 0.3 that were rejected go to the residual, the second id alone;
that one is drafted with 0.1 and always kept, so it comes out with 0.1 + 0.3 = 0.4.

Two implementations say the same: `accept_reference`, in torch, is the definition and the place to read first; kernels.cu,
compiled when it is first needed, is what runs where it can (AURORA_KERNEL=reference|fused forces one).  `python verify.py
--bench` compares them.

Nothing here knows about models.  Randomness is an argument: the same coins give the same tokens.
Letters: B batch rows, K drafted tokens a round, V vocabulary.
"""

import argparse
import functools
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch


def probabilities(logits, temperature):
    """softmax(logits / temperature) in float64; temperature 0 puts all mass on the (first) argmax.

    logits (..., V) of any float dtype, -inf meaning impossible; temperature (...) float64, broadcast over V.
    A row that holds a NaN or a +inf, or nothing but -inf, comes out as NaN."""
    logits = logits.double()
    temperature = temperature[..., None]
    greedy = temperature == 0
    soft = torch.softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy & ~soft.isnan(), hard, soft)


def inverse_cdf(mass, coin):
    """The first id whose cumulative mass exceeds coin * total: a draw from mass / total, always of mass > 0.

    mass (..., V) float64, not negative, total > 0; coin (...) float64 in [0, 1).  Returns (...) int64."""
    cumulative = mass.cumsum(-1)
    threshold = coin[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=mass.shape[-1] - 1)


class NoDistribution(ValueError):
    """Logits that acceptance reads are NaN, +inf or nothing but -inf."""


REASONS = [None, "coins must lie in [0, 1)", "draft_tokens must be -1 (pad) or ids in 0..V-1",  # kernels.cu: Status
           "temperature must be 0 (greedy) or positive",
           "logits without a distribution (NaN, +inf or all -inf) in a row that acceptance reads"]


def accept_reference(target_logits, draft_logits, draft_tokens, coins, temperature):
    """The rule: arguments and results as of `accept`, below; shapes are checked, temperature (B,) float64."""
    B, K = draft_tokens.shape
    V = target_logits.shape[-1]
    for reason, fits in ((1, (coins >= 0) & (coins < 1)), (2, (draft_tokens >= -1) & (draft_tokens < V)), (3, temperature >= 0)):
        if not fits.all():
            raise ValueError(REASONS[reason])

    target_p = probabilities(target_logits, temperature[:, None])  # (B, K+1, V)
    ids = draft_tokens.clamp(min=0)[..., None]  # (B, K, 1)
    draft_q = torch.zeros_like(target_p[:, :K]).scatter_(-1, ids, 1.0)  # as proposed outright
    if draft_logits is not None:
        sampled = (temperature > 0)[:, None, None]  # at temperature 0 the draft's choice is no draw either
        draft_q = torch.where(sampled, probabilities(draft_logits, temperature[:, None]), draft_q)

    p = target_p[:, :K].gather(-1, ids).squeeze(-1)  # (B, K): target_p(x_k), draft_q(x_k)
    q = draft_q.gather(-1, ids).squeeze(-1)
    drafted = draft_tokens >= 0
    kept = (coins[:, :K] * q < p) & drafted  # strict: a coin of 0 keeps nothing impossible
    num_accepted = kept.long().cumprod(-1).sum(-1)  # (B,) length of the kept prefix

    # The row at which each chain stopped: the residual after a rejection, target_p after K or at a pad.
    row = torch.arange(B, device=draft_tokens.device)
    mass = target_p[row, num_accepted]  # (B, V)
    if K:
        last = num_accepted.clamp(max=K - 1)
        rejected = (num_accepted < K) & drafted[row, last]
        residual = torch.where(rejected[:, None], mass - draft_q[row, last], mass).clamp(min=0)
        empty = residual.sum(-1, keepdim=True) == 0  # target_p = draft_q up to rounding
        mass = torch.where(empty, mass, residual)
    next_token = inverse_cdf(mass, coins[:, K])

    position = torch.arange(K + 1, device=draft_tokens.device)
    read = position <= num_accepted[:, None]  # (B, K+1) the rows that the decision rests on
    broken = (read & target_p[..., 0].isnan()).any() | (read[:, :K] & drafted & draft_q[..., 0].isnan()).any()
    if broken:
        raise NoDistribution(REASONS[4])
    return num_accepted, next_token


FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is left to the reference


def accept(target_logits, draft_logits, draft_tokens, coins, temperature=1.0, draft_lse=None):
    """One round's decision for every row.

    target_logits (B, K+1, V): row k is the target's view of the place of draft token k, row K of the bonus.
    draft_logits (B, K, V): exactly what the draft tokens were drawn from, or None if they were not drawn but
        proposed outright (draft_q is then one-hot, so a token is kept with probability target_p).
    draft_tokens (B, K) int64; -1 pads the tail of a shorter draft and is never kept: there, the next token
        comes from target_p.
    coins (B, K+1) float64 in [0, 1): coin k < K decides about token k, coin K draws the next token.
    temperature: float or (B,), >= 0; 0 is greedy: keep while the draft token is the argmax, then the argmax.
    draft_lse (B, K) float64, optional: logsumexp(draft_logits / temperature), if drafting has it anyway.  It changes
        no decision; the kernel takes its word for it and reads the draft's rows only where one was rejected.

    Returns num_accepted (B,) int64 in 0..K and next_token (B,) int64, an id with target_p > 0.
    Raises ValueError on shapes, dtypes, ids or coins out of range, and if a row of logits that the decision
    rests on has no distribution (NaN, +inf, all -inf); rows after the first rejection are not looked at.
    """
    B, K = draft_tokens.shape
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=target_logits.device)
    if temperature.shape != (B,):
        if temperature.ndim:
            raise ValueError(f"temperature must be a float or (B,) = ({B},), got {tuple(temperature.shape)}")
        temperature = temperature.expand(B)
    _check_shapes(target_logits, draft_logits, draft_tokens, coins, draft_lse)
    fused = kernel(target_logits.device.type)
    if not fused or any(x is not None and x.dtype not in FUSED_DTYPES for x in (target_logits, draft_logits)):
        return accept_reference(target_logits, draft_logits, draft_tokens, coins, temperature)

    target_logits, draft_logits = _rows(target_logits), _rows(draft_logits)
    num_accepted, next_token, status = fused(target_logits, draft_logits, draft_lse, draft_tokens, coins, temperature)
    worst = max(status.tolist(), default=0)  # (B,), 0 if all is well; the one transfer to the host
    if worst:
        kind = NoDistribution if worst == 4 else ValueError
        raise kind(f"{REASONS[worst]}; batch rows {[b for b, s in enumerate(status.tolist()) if s == worst]}")
    return num_accepted, next_token


def _check_shapes(target_logits, draft_logits, draft_tokens, coins, draft_lse):
    B, K = draft_tokens.shape
    V = target_logits.shape[-1]
    if target_logits.shape != (B, K + 1, V):
        raise ValueError(f"target_logits must be (B, K+1, V) = ({B}, {K + 1}, {V}), got {tuple(target_logits.shape)}")
    if draft_logits is not None and draft_logits.shape != (B, K, V):
        raise ValueError(f"draft_logits must be (B, K, V) = ({B}, {K}, {V}), got {tuple(draft_logits.shape)}")
    if coins.shape != (B, K + 1) or coins.dtype != torch.float64:
        raise ValueError(f"coins must be (B, K+1) = ({B}, {K + 1}) float64, got {tuple(coins.shape)} {coins.dtype}")
    if draft_tokens.dtype != torch.int64:
        raise ValueError(f"draft_tokens must be int64, got {draft_tokens.dtype}")
    if draft_lse is not None and (draft_lse.shape != (B, K) or draft_lse.dtype != torch.float64):
        raise ValueError(f"draft_lse must be (B, K) = ({B}, {K}) float64, got {tuple(draft_lse.shape)} {draft_lse.dtype}")


# ---- top-k and top-p, and drawing -----------------------------------------------------------------------


def keep_top(logits, temperature, top_p, top_k):
    """logits with -inf wherever top-k, and then top-p, cut.  What is equal to the last one kept stays too.

    logits (B, ..., V); (B,) each: temperature float64, top_p float64 in (0, 1], the least share of the distribution after
    temperature and top-k that is to be kept (1 is off), top_k int64 (0 is off).  At temperature 0 nothing is cut."""
    temperature, top_p, top_k = (x.view(-1, *[1] * (logits.ndim - 1)) for x in (temperature, top_p, top_k))
    V, first = logits.shape[-1], max(1024, int(top_k.max()))
    top_k = torch.where(top_k > 0, top_k, V)
    on = (temperature > 0) & ((top_p < 1) | (top_k < V))
    scale = torch.where(on, temperature, 1.0)
    total = (logits.double() / scale).logsumexp(-1, keepdim=True)
    for n in sorted({min(V, first), V}):  # the largest 1024 nearly always tell; if the last of them is kept, all must be sorted
        ordered = logits.topk(n, -1).values
        z = (ordered.double() / scale).masked_fill(torch.arange(n, device=logits.device) >= top_k, float("-inf"))
        mass = (z - torch.where(top_k <= n, z.logsumexp(-1, keepdim=True), total)).exp()
        kept = ((mass.cumsum(-1) - mass < top_p) | (top_p == 1)) & (z > float("-inf"))  # a prefix, never empty
        if not (kept[..., -1:] & on).any():
            break
    least = ordered.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return logits.masked_fill((logits < least) & on, float("-inf"))


class Sampling:
    """How the logits of B rows become distributions: laws [(temperature, top_p, top_k)], one for each row."""

    def __init__(self, laws, device=None):
        temperature, top_p, top_k = zip(*laws)
        self.temperature = torch.tensor(temperature, dtype=torch.float64, device=device)  # (B,) each
        self.top_p = torch.tensor(top_p, dtype=torch.float64, device=device)
        self.top_k = torch.tensor(top_k, dtype=torch.int64, device=device)
        self.cuts, self.greedy = any(p < 1 or k > 0 for _, p, k in laws), 0 in temperature

    def filter(self, logits):
        """(B, ..., V) -> the same, -inf where a row's top-k and top-p cut."""
        return keep_top(logits, self.temperature, self.top_p, self.top_k) if self.cuts else logits

    def draw(self, logits, coins):
        """A token for each place: logits (B, T, V), coins (B, T) -> the logits that it is drawn from, filtered, the token
        (B, T) int64 and its log-probability (B, T) float32: 0, certain, at temperature 0."""
        logits = self.filter(logits)
        T = self.temperature[:, None]
        p = probabilities(logits, T) if self.greedy else torch.softmax(logits.double() / T[..., None], dim=-1)  # alike, but shorter
        token = inverse_cdf(p, coins)
        return logits, token, p.gather(-1, token[..., None]).squeeze(-1).log().float()

    def confidence(self, logits, logprob):
        """Of what `draw` returned: how probable a token was, (B, T); at temperature 0, as if that were 1."""
        if self.greedy:
            greedily = (logits.amax(-1) - logits.logsumexp(-1)).float()
            logprob = torch.where(self.temperature[:, None] > 0, logprob, greedily)
        return logprob.exp()


# ---- the kernel ----------------------------------------------------------------------------------------


def _rows(logits):
    """The kernel takes any strides, but the ids of a row must lie side by side."""
    return logits if logits is None or logits.stride(-1) == 1 else logits.contiguous()


@functools.cache
def kernel(device):
    """torch.ops.aurora.accept for tensors on "cpu" or "cuda"; None where the reference has to do."""
    choice = os.environ.get("AURORA_KERNEL", "")
    if choice not in ("", "fused", "reference"):
        raise ValueError(f"AURORA_KERNEL must be reference or fused, got {choice!r}")
    if choice == "reference" or device not in ("cpu", "cuda"):
        return None
    try:
        load_kernel(device)
        return torch.ops.aurora.accept.default
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        if choice == "fused":
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the slower torch reference decides what is accepted, as kernels.cu was not built: {reason}", stacklevel=3)
        return None


@functools.cache
def load_kernel(device, source=Path(__file__).with_name("kernels.cu")):
    """Loads what g++ (for the CPU) or nvcc (for CUDA) makes of kernels.cu, and first makes it if the cache has it not.

    The cache is torch's, ~/.cache/torch_extensions or $TORCH_EXTENSIONS_DIR; what the library depends on is in its
    name.  It is built in a folder of its own and moved into place, so there is no lock that a Ctrl-C could leave."""
    declare_operator()
    march = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}.get(torch.backends.cpu.get_cpu_capability(), [])
    # Not -ffast-math: NaN must stay NaN.  And a * b - c * d must be 0 if a = c and b = d, so the compiler fuses none.
    flags = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", *march]
    built_from = [source.read_text(), torch.__version__, *flags]
    if device == "cuda":
        built_from += [torch.version.cuda, *(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))]
    name = f"aurora_{device}_{hashlib.sha256(repr(built_from).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions") / f"{name}.so"
    if not cache.exists():
        from torch.utils import cpp_extension

        cpp_extension.verify_ninja_availability()
        print(f"compiling kernels.cu for {device}, once: {'a minute' if device == 'cuda' else 'some seconds'} ...", file=sys.stderr, flush=True)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            cpp_extension.load(name, [str(source)], extra_cflags=["-x", "c++", *flags], extra_cuda_cflags=["-fmad=false"],
                               build_directory=folder, with_cuda=device == "cuda", is_python_module=False)
            os.replace(Path(folder) / cache.name, cache)
    else:
        torch.ops.load_library(cache)


@functools.cache
def declare_operator():
    """aurora::accept for torch.compile: its schema, and the shapes of what it returns, (B,) int64 each: tokens kept,
    next token, status (0, or the index of a reason).  Whoever calls it directly has to look at the status."""
    torch.library.define("aurora::accept", "(Tensor target_logits, Tensor? draft_logits, Tensor? draft_lse, "
                                           "Tensor draft_tokens, Tensor coins, Tensor temperature) -> (Tensor, Tensor, Tensor)")
    torch.library.register_fake("aurora::accept", lambda target_logits, draft_logits, draft_lse, draft_tokens, coins,
                                temperature: tuple(draft_tokens.new_empty(draft_tokens.shape[0]) for _ in range(3)))


# ---- python verify.py --bench ------------------------------------------------------------------------------


def softmax_then_multinomial(target_logits, draft_logits, draft_tokens, temperature):
    """The plain way, as a yardstick: float32 probabilities of every row, torch's own random numbers."""
    target_p, draft_q = ((x.float() / temperature).softmax(-1) for x in (target_logits, draft_logits))
    p, q = (x[:, : draft_tokens.shape[1]].gather(-1, draft_tokens[..., None]).squeeze(-1) for x in (target_p, draft_q))
    num_accepted = (torch.rand_like(p) * q < p).long().cumprod(-1).sum(-1)
    draft_q = torch.nn.functional.pad(draft_q, (0, 0, 0, 1))  # no draft stands at the bonus
    row = torch.arange(len(p), device=p.device)
    return num_accepted, torch.multinomial((target_p - draft_q)[row, num_accepted].clamp(min=0), 1).squeeze(-1)


def median_seconds(contenders, device, turns=9):
    """Medians of interleaved turns: whatever else the machine does meets all contenders alike.  A turn is 5 ms, or two
    runs if that is longer; its first run is not counted, so that no one pays for the caches that another left."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            turn = []
            while len(turn) < 2 or sum(turn) < 5e-3:
                start = time.perf_counter()
                run(), wait()
                turn.append(time.perf_counter() - start)
            times[name] += turn[1:]
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


@torch.no_grad()
def bench(device, dtype, batches, threads):
    """Every draft token is kept, the most work there is: 2K+1 rows are read, K+1 where draft_lse is known."""
    if not kernel(device):
        sys.exit("the kernel was not built: nothing to compare")
    bits = torch.finfo(dtype).bits
    print(f"{device}, {str(dtype)[6:]}, every token kept; medians of interleaved runs, in microseconds a round")
    print("threads    B       V   K  reference  softmax+multinomial    fused  with lse  MB read   GB/s  copy GB/s  reference/fused")
    for n, B, V, K in itertools.product(threads, batches, (256, 32000, 151936) if device == "cpu" else (32000, 128256, 151936), (4, 8)):
        torch.set_num_threads(n)
        g = torch.Generator().manual_seed(0)
        target = (2 * torch.randn(B, K + 1, V, generator=g)).to(device, dtype)
        draft, temperature = target[:, :K].clone(), torch.full((B,), 0.8, dtype=torch.float64, device=device)
        tokens = torch.randint(V, (B, K), generator=g).to(device)
        coins = torch.rand(B, K + 1, dtype=torch.float64, generator=g).to(device)
        lse = (draft.double() / 0.8).logsumexp(-1)
        megabytes = B * (2 * K + 1) * V * bits / 8e6
        block = torch.empty(max(1 << 22, B * (2 * K + 1) * V * bits // 16), dtype=torch.uint8, device=device)
        other = torch.empty_like(block)
        s = median_seconds({
            "reference": lambda: accept_reference(target, draft, tokens, coins, temperature),
            "plain": lambda: softmax_then_multinomial(target, draft, tokens, 0.8),
            "fused": lambda: accept(target, draft, tokens, coins, temperature),
            "lse": lambda: accept(target, draft, tokens, coins, temperature, lse),
            "copy": lambda: other.copy_(block)}, device)
        print(f"{n:7} {B:4} {V:7} {K:3} {1e6 * s['reference']:10.0f} {1e6 * s['plain']:20.0f} {1e6 * s['fused']:8.1f} {1e6 * s['lse']:9.1f}"
              f" {megabytes:8.2f} {megabytes / 1e3 / s['fused']:6.2f} {2 * len(block) / 1e9 / s['copy']:10.2f} {s['reference'] / s['fused']:16.1f}",
              flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="verify.py", description="Times the acceptance kernel against torch.")
    parser.add_argument("--bench", action="store_true", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 on the CPU, 1 8 64 256 on CUDA")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    cuda = args.device == "cuda"
    bench(args.device, getattr(torch, args.dtype or ("bfloat16" if cuda else "float32")),
          args.batch or ([1, 8, 64, 256] if cuda else [1]), args.threads[:1] if cuda else args.threads)
