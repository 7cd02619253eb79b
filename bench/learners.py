"""python -m bench.learners: what each estimator makes of the same answers, in the same steps.

    python -m bench.learners --traffic python                          from random weights
    python -m bench.learners --draft static-python --traffic cpp       after a shift

No memory and no gate.  Every arm learns from the answers to the same prompts, one after the other,
and is judged on held-out answers: tokens a round to expect of chains of five by the rule in
brackets.  `rounds`: it learns from the rounds as served too, kept and rejected tokens alike.
"""

import argparse
import statistics

import torch
from tqdm import tqdm

import aurora
from formats.find import find_draft, find_target
from generation import Generation
from learner import Learner, expected_length
from model import TargetHead, by_columns
from support import options
from support.command import command
from support.corpus import prompts_of
from support.draft_length import HEAD, Plan
from support.precision import ready_to_serve

ARMS = {  # estimator, rule, learn_from
    "log": ("log", "block", "target"),
    "log, token rule": ("log", "token", "target"),
    "expected": ("expected", "block", "target"),
    "kl": ("kl", "block", "target"),
    "log + rounds": ("log", "block", "both"),
    "expected + rounds": ("expected", "block", "both"),
}
CHAIN, HELD_OUT = 5, 24


def answered(target, requests):
    """Traces of plain decoding, all requests at once."""
    generation = Generation(target, None, requests)
    while not generation.done:
        drafted = generation.draft_tokens(Plan())
        generation.commit(drafted, *generation.verify(drafted))
    return [generation.trace(b) for b in range(len(requests))]


def served(target, draft, request):
    """The trace of one request, served in chains of CHAIN."""
    generation = Generation(target, draft, [request])
    while not generation.done:
        drafted = generation.draft_tokens(Plan(HEAD, CHAIN, [0.0] * CHAIN))
        generation.commit(drafted, *generation.verify(drafted))
    return generation.trace()


def mean_length(draft, traces, head, rule):
    lengths = [expected_length(draft, trace, head, CHAIN, rule) for trace in traces]
    return sum(lengths) / len(lengths)


def learned(target, draft, args, requests, traces, arm, bar):
    """-> the draft that the arm makes of these answers."""
    estimator, rule, learn_from = ARMS[arm]
    learner = Learner(draft.clone(), TargetHead(target), estimator, rule, args.lr, args.learn_every,
                      CHAIN, learn_from, fresh=args.draft == "scratch", gate=False, seed=args.seed)
    for request, trace in zip(requests, traces):
        if learn_from == "both":
            trace = served(target, learner.average, request)
        learner.update(trace)
        bar.update()
    return learner.average


def main():
    parser = argparse.ArgumentParser(prog="bench.learners", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    ours, rest = parser.parse_known_args()
    args = options.arguments(rest)
    target, tokenizer = find_target(args.target, args.dtype)
    target = ready_to_serve(target, args.device, args.dtype)
    torch.set_flush_denormal(True)
    by_columns(target)
    head, found = TargetHead(target), {}
    for seed in ours.seeds:
        args.seed = seed
        torch.manual_seed(seed)
        draft, _ = find_draft(args.draft, target, args.draft_vocab)
        requests = aurora.make_requests(args, tokenizer, target.config.max_position_embeddings)
        texts = prompts_of(args.traffic, "eval", HELD_OUT, seed)
        held_out = [aurora.Request(options.encode(text, tokenizer), args.max_new_tokens, 10**9 + i,
                                   args.temperature) for i, text in enumerate(texts)]
        held_out, traces = answered(target, held_out), answered(target, requests)
        bar = tqdm(total=len(ours.arms) * len(requests), unit="answer", disable=None)
        for arm in (None, *ours.arms):
            made = learned(target, draft, args, requests, traces, arm, bar) if arm else draft
            for rule in ("block", "token"):
                length = mean_length(made, held_out, head, rule)
                found.setdefault((arm or "start", rule), []).append(length)
        bar.close()
    print(f"{args.traffic} from {args.draft}, {len(requests)} answers, seeds {ours.seeds}: "
          "median and range of tokens a round")
    for (arm, rule), lengths in found.items():
        each = " ".join(f"{x:.3f}" for x in lengths)
        print(f"{arm:20s} ({rule:5s})  {statistics.median(lengths):.3f}   {each}")


if __name__ == "__main__":
    command(main, "bench.learners")
