"""python -m bench.profile: where the milliseconds of a round go.

    python -m bench.profile --draft static             the embedded target
    python -m bench.profile --target DIR --draft DIR   a checkpoint

Rounds of several kinds in turn, on 64 random tokens each: the median time of the steps of a round.
The last line is what nothing can be faster than: reading the target's weights once, at the speed
of a measured copy.
"""

import argparse
import time
from statistics import median

import torch
from tqdm import tqdm

from aurora import Request
from formats.find import find_draft, find_target
from generation import Generation
from model import by_columns
from support import options
from support.build import kernel
from support.command import command
from support.draft_length import HEAD, REQUEST, Plan
from support.precision import ready_to_serve

STEPS = ("recall", "draft_tokens", "verify", "commit")
PROMPT = 64


class Timed(Generation):
    """A Generation that notes the seconds of each of its steps."""

    def __getattribute__(self, name):
        step = super().__getattribute__(name)
        if name not in STEPS:
            return step

        def timed(*args):
            start = time.perf_counter()
            out = step(*args)
            self.took[name] = self.took.get(name, 0) + time.perf_counter() - start
            return out

        return timed


def a_round(target, draft, plan, rule):
    """Two rounds of this kind -> the Generation, {step: seconds of the second}."""
    text = torch.randint(1, target.config.vocab_size - 1, (PROMPT,)).tolist()
    work = Timed(target, draft, [Request(text, 64, 0, 0.8)], own_memory=True, rule=rule)
    for _ in range(2):
        work.took = {}
        work.recall()
        work.guesses = {REQUEST: [(1, text[: plan.K])]}
        drafted = work.draft_tokens(plan)
        work.commit(drafted, *work.verify(drafted))
    return work, work.took


def seconds_of_copy(size):
    """Seconds to read `size` bytes, by the speed of a copy, which reads and writes."""
    source = torch.ones(size // 4)
    out, took = torch.empty_like(source), []
    for _ in range(9):
        start = time.perf_counter()
        out.copy_(source)
        took.append(time.perf_counter() - start)
    return median(took) / 2


def main():
    parser = argparse.ArgumentParser(prog="bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    ours, rest = parser.parse_known_args()
    args = options.arguments(rest)
    target, _ = find_target(args.target, args.dtype)
    target = ready_to_serve(target, args.device, args.dtype)
    draft, _ = find_draft(args.draft, target, args.draft_vocab)
    plans = {"plain": Plan()}
    plans |= {f"head, K = {K}": Plan(HEAD, K, [0.0] * K) for K in (1, 4, 8) if draft}
    plans |= {f"memory, K = {K}": Plan(REQUEST, K) for K in (4, 8, 16)}
    for model in filter(None, (target, draft)):
        by_columns(model)
    kernel(args.device)
    found = {name: [] for name in plans}
    for _ in tqdm(range(ours.repeats), unit="turn", disable=None):
        for name, plan in plans.items():
            found[name].append(a_round(target, draft, plan, args.rule)[1])
    print(f"{'ms':16s}" + "".join(f"{step:>14s}" for step in STEPS) + f"{'together':>14s}  x plain")
    plain = None
    for name, rounds in found.items():
        each = [1e3 * median(took[step] for took in rounds) for step in STEPS]
        whole = 1e3 * median(sum(took.values()) for took in rounds)
        plain = plain or whole
        print(f"{name:16s}" + "".join(f"{x:14.2f}" for x in (*each, whole))
              + f"{whole / plain:9.2f}")
    size = sum(p.numel() * p.element_size() for p in target.parameters())
    least = 1e3 * seconds_of_copy(size)
    print(f"reading the target's {size / 1e6:.0f} MB takes {least:.2f} ms: a plain token takes "
          f"{plain / least:.1f} times as long")


if __name__ == "__main__":
    command(main, "bench.profile")
