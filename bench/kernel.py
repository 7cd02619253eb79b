"""The acceptance kernel against torch: python -m bench.kernel

The reference is accept_torch; "plain" is the usual way, the token rule on float32 softmaxes
and torch.multinomial; "token" and "block" are kernels.cu.  Two kinds of round: all tokens kept, and
some, where the block rule goes back along the chain, the token rule has read no further, and both
draw from a residual.  "MB" are the 2K+1 rows that the block rule reads at least once, GB/s is that
over its time, beside a measured copy (counted twice: read and written).

Letters: B batch rows, K drafted tokens, V vocabulary.
"""

import argparse
import itertools
import sys
import time

import torch

from support.accept_torch import accept_torch
from support.build import kernel
from support.sampling import inverse_cdf, probabilities
from verify import accept

TEMPERATURE = 0.8


def a_round(seed, B, K, V, kept, device, dtype):
    """kept "all": the draft is the target; "some": about two in three of its tokens are kept."""
    g = torch.Generator(device).manual_seed(seed)
    target = 2.5 * torch.randn(B, K + 1, V, generator=g, device=device)
    noise = 0.8 * torch.randn(B, K, V, generator=g, device=device)
    draft = target[:, :K] + noise * (kept == "some")
    target, draft = target.to(dtype), draft.to(dtype)
    temperature = torch.full((B,), TEMPERATURE, dtype=torch.float64, device=device)
    coins = torch.rand(B, 2 * K + 1, dtype=torch.float64, generator=g, device=device)
    tokens = inverse_cdf(probabilities(draft, temperature[:, None]), coins[:, K + 1 :])
    return target, draft, tokens, coins[:, : K + 1], temperature


def plain(target_logits, draft_logits, draft_tokens, *_):
    target_p = (target_logits.float() / TEMPERATURE).softmax(-1)
    draft_q = (draft_logits.float() / TEMPERATURE).softmax(-1)
    p = target_p[:, :-1].gather(-1, draft_tokens[..., None]).squeeze(-1)
    q = draft_q.gather(-1, draft_tokens[..., None]).squeeze(-1)
    num_accepted = (torch.rand_like(p) * q < p).long().cumprod(-1).sum(-1)
    draft_q = torch.nn.functional.pad(draft_q, (0, 0, 0, 1))  # no draft stands at the bonus
    row = torch.arange(len(p), device=p.device)
    mass = (target_p - draft_q)[row, num_accepted].clamp(min=0)
    return num_accepted, torch.multinomial(mass + 1e-30, 1).squeeze(-1)


def median_seconds(contenders, device, turns):
    """Medians of interleaved turns: whatever else the machine does meets all contenders alike.  A
    turn is 5 ms, or two runs if that is longer; its first run is not counted, so that nobody pays
    for the caches that another left."""
    times = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            turn = []
            while len(turn) < 2 or sum(turn) < 5e-3:
                start = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                turn.append(time.perf_counter() - start)
            times[name] += turn[1:]
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


@torch.no_grad()
def measure(args, threads, B, V, kept, K):
    torch.set_num_threads(threads)
    count = max(1, 8 // B)  # rounds in a run: one alone might keep none, or all
    rounds = [a_round(i, B, K, V, kept, args.device, args.dtype) for i in range(count)]
    bytes_read = B * (2 * K + 1) * V * args.dtype.itemsize
    here = torch.empty(max(1 << 22, bytes_read * count // 2), dtype=torch.uint8, device=args.device)
    there = torch.empty_like(here)
    seconds = median_seconds({
        "reference": lambda: [accept_torch(*case, True) for case in rounds],
        "plain": lambda: [plain(*case) for case in rounds],
        "token": lambda: [accept(*case, "token") for case in rounds],
        "block": lambda: [accept(*case, "block") for case in rounds],
        "copy": lambda: there.copy_(here),
    }, args.device, args.turns)
    print(f"{threads:7} {B:4} {V:7} {K:3} {kept:>5}", end="")
    for rule in ("token", "block"):
        num_accepted = torch.cat([accept(*case, rule)[0] for case in rounds])
        print(f" {num_accepted.double().mean().item():6.2f}", end="")
    for name in ("reference", "plain", "token", "block"):
        print(f" {1e6 * seconds[name] / count:9.1f}", end="")
    speed, copied = count * bytes_read / seconds["block"], 2 * len(here) / seconds["copy"]
    print(f" {bytes_read / 1e6:7.2f} {speed / 1e9:7.2f} {copied / 1e9:7.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Times the acceptance kernel against torch.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--batch", type=int, nargs="+",
                        help="default: 1 on the CPU, 1 8 64 256 on CUDA")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[256, 32000, 151936])
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    if min([*(args.batch or ()), *args.threads, *args.vocabulary, args.turns]) < 1:
        parser.error("numbers must be at least 1")
    cuda = args.device == "cuda"
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    if not kernel(args.device):
        sys.exit("the kernel was not built: nothing to compare")
    print(f"{args.device}, {str(args.dtype)[6:]}: tokens kept by rule; "
          "medians of interleaved runs, in microseconds a round")
    print("threads    B       V   K  kept  token  block reference     plain     token     block"
          "      MB    GB/s    copy")
    batches = args.batch or ([1, 8, 64, 256] if cuda else [1])
    for case in itertools.product(args.threads, batches, args.vocabulary, ("all", "some"), (4, 8)):
        measure(args, *case)


if __name__ == "__main__":
    main()
