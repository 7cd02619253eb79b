"""python -m bench.arms: tokens a second of several ways to serve, on the same requests, in turn.

    python -m bench.arms --vary length                 every fixed draft length, and auto
    python -m bench.arms --vary rule                   block against token, the same seeds
    python -m bench.arms --vary parts                  the head, the memory, learning; each and both

Prints, for every class, tokens a second over those of plain decoding and tokens a round; the time
of learning and remembering is counted.  Seeds differ in prompts and coins.
"""

import argparse
import statistics
from collections import defaultdict

import torch
from tqdm import tqdm

import aurora
from formats.find import find_draft, find_target
from model import by_columns
from support import options
from support.draft_length import FixedLength


def arms_for(vary, target, args, lengths):
    """-> {name: (arguments that differ, whether it learns)}."""
    if vary == "length":
        fixed = {f"K={K}": ({"num_speculative_tokens": K, "memory": "off"}, False) for K in lengths}
        return fixed | {"auto": ({"memory": "off"}, False)}
    if vary == "rule":
        out = {}
        for K in (4, 8, "auto"):
            for rule in ("block", "token"):
                changes = {"num_speculative_tokens": K, "rule": rule, "memory": "off"}
                out[f"{rule} K={K}"] = changes, False
        return out
    return {
        "head": ({"memory": "off"}, False), "+ request memory": ({"memory": "request"}, False),
        "+ shared memory": ({"memory": "shared"}, False),
        "+ learning": ({"memory": "off"}, True), "both": ({"memory": "shared"}, True),
    }


def build(target, args, changes, learns, costs):
    here = argparse.Namespace(**vars(args) | changes)
    draft, _ = find_draft(here.draft, target, here.draft_vocab)
    served = draft.clone()
    by_columns(served)
    arm, costs = aurora.make_arm(target, served, here, costs)
    learner = None
    if learns:
        learner = aurora.make_learner(draft, None, target, here)
    return arm, learner, costs


def serve_all(target, args, vary, lengths, found):
    """One seed: every request by every arm in turn -> adds (tokens, seconds, rounds) to found."""
    tokenizer = find_target(args.target, args.dtype)[1]
    requests = aurora.make_requests(args, tokenizer, target.config.max_position_embeddings)
    arms, costs = {"plain": (aurora.Arm(length=FixedLength(0)), None)}, None
    torch.manual_seed(args.seed)
    for name, (changes, learns) in arms_for(vary, target, args, lengths).items():
        arm, learner, costs = build(target, args, changes, learns, costs)
        arms[name] = arm, learner
    runs = {name: aurora.aurora(target, *arm, iter(requests)) for name, arm in arms.items()}
    order = list(runs)
    for i in tqdm(range(len(requests)), unit="request", disable=None):
        for name in order:
            served = next(runs[name])
            key = args.seed, served.request.kind, i >= len(requests) // 2, name
            generation = served.generation
            found[key][0] += len(generation.answer())
            found[key][1] += served.seconds + served.waited
            found[key][2] += len(generation.rounds[0])
        order.append(order.pop(0))
    for arm, learner in arms.values():
        if learner:
            learner.result()
            learner.close()


def main():
    parser = argparse.ArgumentParser(prog="bench.arms", description=__doc__.split("\n")[0])
    parser.add_argument("--vary", choices=("length", "rule", "parts"), required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    ours, rest = parser.parse_known_args()
    args = options.arguments(rest)
    target = find_target(args.target, args.dtype)[0].eval()
    torch.set_num_threads(1)
    by_columns(target)
    found = defaultdict(lambda: [0, 0.0, 0])
    for seed in range(ours.seeds):
        args.seed = seed
        serve_all(target, args, ours.vary, ours.lengths, found)
    names = list(dict.fromkeys(name for *_, name in found))
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in found))
    print(f"{'':18s}" + "".join(f"{k:>26s}" for k in kinds) + "   x plain (seeds), tokens a round")
    for name in names:
        cells = []
        for kind in kinds:
            ratios, tokens, rounds = [], 0, 0
            for seed in range(ours.seeds):
                halves = [(seed, kind, half, arm) for half in (False, True) for arm in (name,)]
                mine = [found[key] for key in halves if key in found]
                base = [found[*key[:3], "plain"] for key in halves if key in found]
                speed = sum(x[0] for x in mine) / sum(x[1] for x in mine)
                ratios.append(speed / (sum(x[0] for x in base) / sum(x[1] for x in base)))
                tokens, rounds = tokens + sum(x[0] for x in mine), rounds + sum(x[2] for x in mine)
            spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
            cells.append(f"{statistics.median(ratios):.2f} ({spread}) {tokens / rounds:.2f}")
        print(f"{name:18s}" + "".join(f"{cell:>26s}" for cell in cells))


if __name__ == "__main__":
    main()
