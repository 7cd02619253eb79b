"""python -m bench.rollback: how often the gate takes back what is as good, how soon what is worse.

    python -m bench.rollback                             in simulation
    python -m bench.rollback --answers 60 [flags]        and with differences of real answers

The gate sees one paired difference an answer: tokens a round to expect of what was learned, less
those of what began.  In simulation they are normal with a standard deviation of 1, or heavy-tailed.
On real answers of the target (flags of aurora.py: --draft static --traffic python) they are those
of a draft whose weights were disturbed: by a hundredth of their size and centred, so that the two
are equally good; and by more, not centred, as a poisoned update would.  Streams draw from them with
replacement.

false alarm: dropped within 200 answers of equally good drafts.  Then 100 answers on which what was
learned was a little ahead, and the poison: answers until what began serves again, and until what
was learned is dropped, in half of the streams and in 95 of 100; over 200 counts as 201.
"""

import argparse
import random
from statistics import fmean

import torch
from tqdm import tqdm

import aurora
from bench.learners import answered
from formats.find import find_draft, find_target
from learner import expected_length
from model import TargetHead
from support import options
from support.gate import Gate
from support.precision import ready_to_serve

ANSWERS, BEFORE = 200, 100
BATCH = 16  # answers decoded together


def false_alarms(draw, streams):
    """draw: () -> a difference of equally good drafts.  -> the share of streams that are dropped"""
    dropped = 0
    for _ in range(streams):
        gate = Gate()
        dropped += any(gate.judge(draw()) for _ in range(ANSWERS))
    return dropped / streams


def delay(before, after):
    """-> answers after the poison until what began serves, and until what was learned is dropped.
    None: it had been dropped before."""
    gate, back = Gate(), None
    if any(gate.judge(before()) for _ in range(BEFORE)):
        return None
    for n in range(1, ANSWERS + 1):
        dropped = gate.judge(after())
        if back is None and not gate.ahead:
            back = n
        if dropped:
            return back, n
    return back or ANSWERS + 1, ANSWERS + 1


def row(name, equal, ahead, worse, streams):
    found = [x for x in (delay(ahead, worse) for _ in range(streams)) if x]
    cells = []
    for delays in zip(*found):
        ordered = sorted(delays)
        cells.append(f"{ordered[len(ordered) // 2]} / {ordered[int(0.95 * len(ordered))]}")
    print(f"{name:44s} {false_alarms(equal, streams):11.1%} {cells[0]:>14s} {cells[1]:>14s}")


def simulated(streams):
    draws = random.Random(0)

    def heavy():
        return draws.gauss(0, 5 if draws.random() < 0.05 else 1)

    for name, noise in ("normal", lambda: draws.gauss(0, 1)), ("heavy", heavy):
        for worse in 0.25, 0.5, 1.0, 2.0:
            row(f"{name}, poison {worse} standard deviations", noise, lambda: 0.2 + noise(),
                lambda: noise() - worse, streams)


def disturbed(draft, size):
    torch.manual_seed(0)
    other = draft.clone()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * p.abs().mean() * torch.randn_like(p))
    return other


def lengths(draft, traces, head):
    traces = tqdm(traces, unit="answer", leave=False, disable=None)
    return [expected_length(draft, trace, head, 5, "block") for trace in traces]


def real(args, answers, streams):
    target, tokenizer = find_target(args.target, args.dtype)
    target = ready_to_serve(target, args.device, args.dtype)
    args.requests = answers
    draft, head, traces = find_draft(args.draft, target)[0], TargetHead(target), []
    requests = aurora.make_requests(args, tokenizer, target.config.max_position_embeddings)
    for i in tqdm(range(0, len(requests), BATCH), unit="batch", disable=None):
        traces += answered(target, requests[i : i + BATCH])
    began, draws = lengths(draft, traces, head), random.Random(0)

    def differences(size):
        return [b - a for a, b in zip(began, lengths(disturbed(draft, size), traces, head))]

    equal = differences(0.01)
    equal = [d - fmean(equal) for d in equal]
    spread = fmean(d * d for d in equal) ** 0.5
    for size in 0.1, 0.3, 1.0:
        poison = differences(size)
        row(f"real, weights disturbed by {size}: {fmean(poison):+.2f} tokens",
            lambda: draws.choice(equal), lambda: draws.choice(equal) + 0.2 * spread,
            lambda: draws.choice(poison), streams)


def main():
    parser = argparse.ArgumentParser(prog="bench.rollback", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=0, help="real ones, of each class; 0: none")
    parser.add_argument("--streams", type=int, default=1000)
    ours, rest = parser.parse_known_args()
    print(f"{'':44s} false alarm    began serves        dropped   median / 95 %, answers")
    simulated(ours.streams)
    if ours.answers:
        torch.set_num_threads(1)
        args = options.arguments(["--draft", "static", "--traffic", "python", *rest])
        real(args, ours.answers, ours.streams)


if __name__ == "__main__":
    main()
