"""python -m bench.arms: tokens a second of several ways to serve, on the same requests, in turn.

    python -m bench.arms --vary length                 every fixed draft length, and auto
    python -m bench.arms --vary rule                   block against token, the same seeds
    python -m bench.arms --vary parts                  the head, the memory, learning; each and both

Prints, for every class, tokens a second over those of plain decoding and tokens a round, for all
requests and for the last half of them; the time of learning and remembering is counted.  Seeds
differ in prompts and coins.  --json FILE keeps a line a request, for bench.picture.
"""

import argparse
import json
import statistics

import torch
from tqdm import tqdm

import aurora
from formats.find import find_draft, find_target
from model import UserError, by_columns
from support import options
from support.command import command
from support.draft_length import FixedLength
from support.precision import ready_to_serve


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


def serve_all(target, tokenizer, args, vary, lengths, mixed):
    """One seed: every request by every arm in turn -> yields a dict a request and arm."""
    requests = aurora.make_requests(args, tokenizer, target.config.max_position_embeddings)
    if mixed:  # the class changes with every request
        kinds = [[r for r in requests if r.kind == kind] for kind in args.traffic.split(",")]
        requests = [r for group in zip(*kinds) for r in group]
    arms, costs = {"plain": (aurora.Arm(length=FixedLength(0)), None)}, None
    torch.manual_seed(args.seed)
    for name, (changes, learns) in arms_for(vary, target, args, lengths).items():
        arm, learner, costs = build(target, args, changes, learns, costs)
        arms[name] = arm, learner
    runs = {name: aurora.aurora(target, *arm, iter(requests)) for name, arm in arms.items()}
    order, seen = list(runs), {}
    for request in tqdm(requests, unit="request", disable=None):
        number = seen[request.kind] = seen.get(request.kind, -1) + 1
        for name in order:
            served = next(runs[name])
            rounds = served.generation.rounds[0]
            by_source = {}
            for x in rounds:
                by_source[x.source] = by_source.get(x.source, 0) + x.accepted
            yield {
                "seed": args.seed, "class": request.kind, "number": number, "arm": name,
                "tokens": len(served.generation.answer()), "rounds": len(rounds),
                "seconds": served.seconds + served.waited, "accepted": by_source,
            }
        order.append(order.pop(0))
    for arm, learner in arms.values():
        if learner:
            learner.result()
            learner.close()


def total(lines, name):
    return sum(line[name] for line in lines)


def cell(lines, plain):
    """Median and range over seeds of the speed over plain, and tokens a round."""
    ratios = []
    for seed in sorted({line["seed"] for line in lines}):
        speeds = []
        for arm in (lines, plain):
            mine = [line for line in arm if line["seed"] == seed]
            speeds.append(total(mine, "tokens") / total(mine, "seconds"))
        ratios.append(speeds[0] / speeds[1])
    spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
    per_round = total(lines, "tokens") / total(lines, "rounds")
    return f"{statistics.median(ratios):.2f} ({spread}) {per_round:.2f}"


def table(lines):
    kinds = list(dict.fromkeys(line["class"] for line in lines))
    print(f"{'':18s}" + "".join(f"{k:>26s}" for k in kinds) + "   x plain (seeds), tokens a round")
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for kind in kinds:
            here = [line for line in lines if line["class"] == kind]
            mine, plain = ([x for x in here if x["arm"] == a] for a in (arm, "plain"))
            cells.append(cell(mine, plain))
        print(f"{arm:18s}" + "".join(f"{text:>26s}" for text in cells))


def main():
    parser = argparse.ArgumentParser(prog="bench.arms", description=__doc__.split("\n")[0])
    parser.add_argument("--vary", choices=("length", "rule", "parts"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--mixed", action="store_true", help="the class changes every request")
    parser.add_argument("--json", metavar="FILE", help="keep a line a request")
    ours, rest = parser.parse_known_args()
    args = options.arguments(rest)
    if args.draft == "none":
        raise UserError("--draft none: every arm but plain decoding has a head")
    target, tokenizer = find_target(args.target, args.dtype)
    target = ready_to_serve(target, args.device, args.dtype)
    by_columns(target)
    lines = []
    for seed in ours.seeds:
        args.seed = seed
        for line in serve_all(target, tokenizer, args, ours.vary, ours.lengths, ours.mixed):
            lines.append(line)
            if ours.json:
                with open(ours.json, "a") as file:
                    print(json.dumps(line), file=file)
    table(lines)
    half = 1 + max(line["number"] for line in lines)
    print("\nthe last half of every class")
    table([line for line in lines if line["number"] >= half // 2])


if __name__ == "__main__":
    command(main, "bench.arms")
