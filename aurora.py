"""Aurora: a draft model that learns while it serves.

    python aurora.py                                the demo: three kinds of traffic, a draft that starts from nothing
    python aurora.py --draft static --compare       plain, static and online, side by side on the same requests
    python aurora.py --prompt "def main():"         one answer, drafted tokens coloured
    python aurora.py --target DIR --draft ngram     a Hugging Face checkpoint, and a draft that needs no model

For every request: draft K tokens, verify them with the target, commit what it accepts and one token of its own; when
the answer is complete, its trace is a lesson, which the draft learns on another core while the next request is served;
what it has learned serves from then on, if that is ahead on answers that it has not learned from.
The method is Aurora's (2602.06932); the README numbers the departures.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall a small model on a busy machine

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import BrokenExecutor
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from draft import Chain, Draft, DraftLength, FixedLength, NGram, load_draft, twin
from model import Bytes, UserError, by_columns, fast_bfloat16, load_target
from pretrain import CLASSES, texts_of
from rl import ESTIMATORS, Learner, Trace, acceptance_on, expected_length
from serve import LONGEST, Generation, Request, compile_forwards, decode, generate, print_profile, print_sweep, seconds_per_round, slots_for
from verify import NoDistribution, kernel
from versions import DIED, Study, load_learner, save_learner

HERE = Path(__file__).parent
ARMS = ("plain", "static", "online")
PROMPT_LENGTH = 128  # characters, of the built-in traffic
EXAMINED = 5  # drafted tokens a round, where drafts are compared on held-out answers
AVERAGED = 15_360  # tokens of answers, over whose steps the weights that serve are averaged


# ---- the loop ------------------------------------------------------------------------------------


def aurora(target, served, study, static, requests, K, args, journal):
    """The algorithm: every request is served by the newest version of the draft, while another core learns from the answer
    before, which may make the next version."""
    lesson = ()
    try:
        for request, arms in plan(requests, args.compare):
            for arm in arms:
                if arm == "online":
                    study.begin(*lesson)  # on another core
                    trace, seconds = generate(target, served, request, K[arm], study.version)  # draft, verify, commit
                    line = journal.record(arm, request, trace, seconds)
                    study.end(served, K[arm], journal)  # what it learned serves, if it is due
                    lesson = () if args.no_learn else (trace, line)
                elif arm == "static":
                    journal.record(arm, request, *generate(target, static, request, K[arm]))
                else:
                    journal.record(arm, request, *generate(target, None, request, K=0))
        study.begin(*lesson)
    finally:
        study.end(served, K["online"], journal)


def draft_lengths(target, online, static, args):
    """The rule of each arm that drafts: a fixed number, or what is best by what rounds of every length cost here and now."""
    if args.num_speculative_tokens != "auto":
        return dict.fromkeys(("static", "online"), FixedLength(args.num_speculative_tokens))
    costs = {}
    for draft in filter(None, (online, static)):
        if alike(draft, args) not in costs:
            costs[alike(draft, args)] = seconds_per_round(target, draft, args.temperature)
    return {arm: DraftLength(costs[alike(draft, args)], stops_early=isinstance(draft, Chain)) for arm, draft in (("static", static), ("online", online)) if draft}


def alike(draft, args):
    """Drafts for which this is equal take equally long; compiled ones are all different."""
    return id(draft) if args.compile else (type(draft), sum(p.numel() for p in draft.parameters()))


def speed_up(target, served, static, requests, learning):
    """--compile -> what is to be said of it."""
    begun = time.perf_counter()
    longest = max(192, *(len(r.prompt) + r.max_new_tokens for r in requests))  # 192: where rounds are timed
    compile_forwards(target, [d for d in (served, static) if d], slots_for(longest + 2 * LONGEST + 1), learning,
                     cuts=any(r.top_p < 1 or r.top_k > 0 for r in requests))
    return f"took {time.perf_counter() - begun:.0f} s"


def plan(requests, compare):
    """Which arms serve each request: all three, or the online one and, up to four times a class, plain decoding.
    Their order rotates, so that whatever drifts on the machine meets them all."""
    total, seen, turns, out = Counter(r.kind for r in requests), Counter(), 0, []
    for request in requests:
        arms = ("plain", "static", "online") if compare else ("plain", "online")
        if compare or seen[request.kind] % -(-total[request.kind] // 4) == 0:
            turn, turns = turns % len(arms), turns + 1
            arms = arms[turn:] + arms[:turn]
        else:
            arms = ("online",)
        seen[request.kind] += 1
        out.append((request, arms))
    return out


# ---- what happened, for people and for programs ------------------------------------------------------


def examination(target, requests):
    """-> a function that examines a draft: {class: tokens a round to expect of it}, on answers that the target gives now
    to `requests`, which nobody learns from.  The answers stay the same, so all that moves is the draft."""
    generation = Generation(target, None, requests, 0)
    for _ in tqdm(decode(generation, FixedLength(0)), desc="held-out answers", total=requests[0].max_new_tokens, leave=False, disable=None, delay=1):
        pass
    answers = {}
    for b, request in enumerate(requests):
        answers.setdefault(request.kind, []).append(generation.trace(b))
    return lambda draft: {kind: mean([expected_length(acceptance_on(draft, trace, EXAMINED)) for trace in traces])
                          for kind, traces in answers.items()}


class Journal:
    """A record per (request, arm): the bar and the log while it runs, the tables and the report at the end.

    examine: says how well the draft that serves would do on held-out answers, asked whenever that is another; or None.
    static: the same of the draft that never learns."""

    def __init__(self, args, total, examine=None, static=None):
        self.records, self.examine, self.static, self.learns = [], examine, static, not args.no_learn
        self.begun = self.examined = examine and examine()
        self.log = open(args.log, "w") if args.log else None
        self.open = []  # lines of answers that were not learned from yet
        self.bar = tqdm(total=total, unit="request", disable=None if total > 1 else True)

    def record(self, arm, request, trace, seconds):
        width = (trace.draft_tokens >= 0).sum(1).cpu()  # what each round drafted; one of plain decoding has no acceptance length
        kept = trace.num_accepted[width > 0]
        line = {"arm": arm, "class": request.kind, "seed": request.seed, "draft_version": trace.version,
                "tokens": min(len(trace.ids) - trace.prompt_length, request.max_new_tokens),
                "rounds": len(kept), "plain_rounds": len(width) - len(kept), "accepted": int(kept.sum()), "drafted": int(width.sum()),
                "tested": int((trace.num_accepted + 1).minimum(width).sum()),  # drafted tokens up to the first rejection
                "acceptance_histogram": torch.bincount(kept, minlength=trace.draft_tokens.shape[1] + 1).tolist(),
                "mean_acceptance_length": 1 + int(kept.sum()) / max(1, len(kept)),
                "serve_seconds": seconds, "learn_seconds": 0.0, "wait_seconds": 0.0,
                "expected_length": None, "staleness": None, "update_loss": None, "gate": None}
        self.records.append(line)
        if self.examine and arm == "online":
            line["held_out"] = self.examined
        if arm == "online" and self.learns:
            self.open.append(line)
        else:
            self.write(line)
        if arm == "online":
            recent = [r for r in self.records[-60:] if r["arm"] == arm][-20:]
            now = summary(recent)
            self.bar.set_postfix_str(
                f"{request.kind}: acceptance length {now['mean_acceptance_length']:.2f}, overlap {overlap(recent):.2f}, "
                f"{now['tokens_per_second']:.0f} tokens/s, draft v{trace.version}", refresh=False)
            self.bar.update()
        return line

    def learned(self, line, published, wait_seconds, learn_seconds, loss=None, expected_length=None, staleness=None, verdict=None):
        """What the learner made of an answer, whose line is whole now; published: other weights serve."""
        line |= {"learn_seconds": learn_seconds, "wait_seconds": wait_seconds, "expected_length": expected_length,
                 "staleness": staleness, "update_loss": loss, "gate": verdict}
        if self.examine:
            self.examined = line["held_out"] = self.examine() if published else self.examined
        self.open.remove(line)
        self.write(line)

    def write(self, line):
        if self.log:
            print(json.dumps(line), file=self.log, flush=True)

    def of(self, kind, arm):
        return [r for r in self.records if r["class"] == kind and r["arm"] == arm]

    def report(self):
        kinds = dict.fromkeys(r["class"] for r in self.records)
        return {kind: {arm: summary(self.of(kind, arm)) for arm in ARMS if self.of(kind, arm)} for kind in kinds}

    def examinations(self):
        return {"held_out": {kind: {"begun": self.begun[kind], "ended": self.examined[kind], "static": (self.static or {}).get(kind)}
                             for kind in self.examined}} if self.examined else {}

    def print(self):
        if not self.records:
            return
        rows = [("class", "arm", "requests", "tokens/s", "with learning", "x plain", "K", "accept. length",
                 "accepted at 1..K", "p50 s", "p95 s", "learn s / serve s")]
        for kind, by_arm in self.report().items():
            plain = by_arm.get("plain")
            for arm, s in by_arm.items():
                ratio = f"{s['tokens_per_second'] / plain['tokens_per_second']:.2f}" if plain else "-"
                rows.append((kind, arm, str(s["requests"]), f"{s['tokens_per_second']:.1f}",
                             f"{s['tokens_per_second_with_learning']:.1f}", ratio,
                             f"{s['drafted_per_round']:.1f}", f"{s['mean_acceptance_length']:.2f}" if arm != "plain" else "-",
                             " ".join(f"{x:.2f}" for x in s["acceptance_per_position"]) or "-",
                             f"{s['latency_p50']:.2f}", f"{s['latency_p95']:.2f}",
                             f"{s['learn_seconds'] / s['serve_seconds']:.2f}" if arm == "online" else "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        print(*("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows), sep="\n")
        curves = {(kind, arm): [r["mean_acceptance_length"] for r in self.of(kind, arm)]
                  for kind in self.report() for arm in ("static", "online") if self.of(kind, arm)}
        print_curves("acceptance length over the requests", curves)
        if self.examined:
            print_curves(f"tokens a round to expect on held-out answers, K = {EXAMINED}, over all requests",
                         {(kind, "held out"): self.held_out(kind) for kind in self.examined}, ends=1)
        else:
            print_curves("tokens a round to expect on each answer, before learning from it",
                         {(kind, "expected"): [r["expected_length"] for r in self.of(kind, "online") if r["expected_length"]] for kind in self.report()})
        if self.static:
            print("static draft there:", *(f"{kind} {length:.2f} " for kind, length in self.static.items()))
        if any(r["gate"] for r in self.records):
            print(self.verdicts())

    def verdicts(self):
        """What the gate said, and after which requests."""
        said = [r["gate"] for r in self.records if r["arm"] == "online"]
        at = {v: [i + 1 for i, x in enumerate(said) if x == v] for v in ("better", "nothing gained", "falls back")}
        times = {v: f"{len(n)} times" + (f" ({'.., ' if len(n) > 4 else ''}{', '.join(map(str, n[-4:]))})" if n else "") for v, n in at.items()}
        updates = sum(r["update_loss"] is not None for r in self.records)
        return (f"gate     {updates} updates in {len(said)} answers; found better {times['better']}, "
                f"taken back {times['nothing gained']}, fell back {times['falls back']}")

    def held_out(self, kind):
        """Of the draft that serves: before the first request, and after each."""
        return [self.begun[kind]] + [r["held_out"][kind] for r in self.records if r["arm"] == "online"]

    def close(self):
        self.bar.close()
        for line in self.open:
            self.write(line)
        if self.log:
            self.log.close()


def print_curves(title, curves, ends=5):
    """A sparkline for each {(class, name): values, one a request} that has any, all on one scale."""
    curves = {name: values for name, values in curves.items() if values}
    cells = {name: bucketed(values, 48) for name, values in curves.items()}
    top = max((max(c) for c in cells.values()), default=1.0)
    if curves:
        print(f"\n{title}, from 1 to {top:.2f}, and the first and the last" + (f" {ends}, averaged" if ends > 1 else ""))
    for (kind, name), values in curves.items():
        print(f"{kind:8s} {name:8s}  {sparkline(cells[kind, name], 1.0, top)}  {mean(values[:ends]):.2f} -> {mean(values[-ends:]):.2f}")


def mean(values):
    return sum(values) / max(1, len(values))


def overlap(records):
    """Of the drafted tokens that were put to the test, the share that was kept: an estimate of alpha."""
    return sum(r["accepted"] for r in records) / max(1, sum(r["tested"] for r in records))


def summary(records):
    """Totals and metrics as vLLM defines them; the README has the formulas."""
    tokens, rounds = sum(r["tokens"] for r in records), max(1, sum(r["rounds"] for r in records))
    passes = sum(r["rounds"] + r["plain_rounds"] for r in records)
    serve, learning, wait = (sum(r[name] for r in records) for name in ("serve_seconds", "learn_seconds", "wait_seconds"))
    histogram = [sum(column) for column in zip_longest(*(r["acceptance_histogram"] for r in records), fillvalue=0)]
    latency = sorted(r["serve_seconds"] for r in records)
    return {"requests": len(records), "tokens": tokens, "serve_seconds": serve, "learn_seconds": learning, "wait_seconds": wait,
            "tokens_per_second": tokens / serve, "tokens_per_second_with_learning": tokens / (serve + wait),
            "mean_acceptance_length": 1 + sum(r["accepted"] for r in records) / rounds,
            "drafted_per_round": sum(r["drafted"] for r in records) / passes,
            "acceptance_per_position": [sum(histogram[k:]) / rounds for k in range(1, len(histogram))],
            "latency_p50": latency[len(latency) // 2], "latency_p95": latency[int(0.95 * (len(latency) - 1) + 0.5)]}


def bucketed(values, width):
    width = min(width, len(values))
    return [mean(values[i * len(values) // width : (i + 1) * len(values) // width]) for i in range(width)]


def sparkline(values, low, top):
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (v - low) / max(top - low, 1e-9)))] for v in values)


def plot(journal, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), constrained_layout=True)
    colours = {"static": "tab:gray", "online": "tab:orange"}
    classes = [r["class"] for r in journal.records if r["arm"] == "online"]  # of one request after the other
    begins = [i for i, kind in enumerate(classes) if i == 0 or kind != classes[i - 1]]
    for i in begins if len(begins) < 20 else ():
        axes.axvline(i, color="black", linewidth=0.5)
        axes.annotate(f" {classes[i]}", (i, 1.0), xycoords=("data", "axes fraction"), va="top")
    for kind in journal.report():
        here = [i + 1 for i, k in enumerate(classes) if k == kind]
        thick = [i if kind in classes[max(0, i - 1) : i + 1] else float("nan") for i in range(len(classes) + 1)]  # not where others are served
        for arm, colour in colours.items():
            served = [r["mean_acceptance_length"] for r in journal.of(kind, arm)][: len(here)]
            axes.plot(here[: len(served)], served, ".", color=colour, alpha=0.35, markersize=4)
            if not journal.examined:  # a running mean instead
                means = [mean(served[max(0, i - len(served) // 3) : i + 1]) for i in range(len(served))]
                axes.plot(here[: len(served)], means, color=colour, linewidth=2)
        if journal.examined:
            curve = journal.held_out(kind)
            axes.plot(range(len(curve)), curve, color=colours["online"], linewidth=0.6)
            axes.plot(thick, curve, color=colours["online"], linewidth=2)
            axes.annotate(f" {kind}", (len(classes), curve[-1]), fontsize=8, va="center")
        if journal.static:
            axes.plot(thick, [journal.static[kind]] * len(thick), color=colours["static"], linewidth=2)
    for arm, colour in colours.items():
        if any(r["arm"] == arm for r in journal.records):
            axes.plot([], [], color=colour, linewidth=2, label=f"{arm} draft, {'on held-out answers' if journal.examined else 'running mean'}")
    axes.plot([], [], ".", color="black", alpha=0.35, markersize=4, label="as served, one request")
    axes.set(xlabel="requests served", ylabel="acceptance length, tokens per round")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


# ---- the command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def length(text):
    return text if text == "auto" else int(text)


def arguments(argv):
    parser = Parser(prog="aurora.py", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("models")
    group.add_argument("--target", default=str(HERE / "weights/target.pt"), metavar="FILE|DIR|NAME", help="of this project, a Hugging Face directory, or a name on its hub")
    group.add_argument("--draft", default="scratch", metavar="scratch|static|ngram|FILE|DIR|NAME", help="where the online draft starts: DIR resumes what --save kept, or is an EAGLE-3 head or a small language model; ngram looks up the prompt")
    group.add_argument("--static", default=str(HERE / "weights/draft.pt"), metavar="ngram|FILE|DIR|NAME", help="the draft that never learns")
    group.add_argument("--draft-vocab", type=int, default=0, metavar="N", help="ids that a scratch draft can say: the lowest and the end tokens; 0 is all")
    group = parser.add_argument_group("traffic")
    group.add_argument("--traffic", default=",".join(CLASSES), help="classes, served one after the other; one may come again")
    group.add_argument("--in-turn", action="store_true", help="a request of each class in turn instead")
    group.add_argument("--requests", type=int, default=12, help="of each class that --traffic names")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--prompts", metavar="FILE", help="a prompt a line, or .jsonl with prompt and, optionally, class")
    one.add_argument("--prompt", metavar="TEXT", help="answer this one prompt, streaming")
    group.add_argument("--max-new-tokens", type=int, default=96)
    group = parser.add_argument_group("decoding")
    group.add_argument("--num-speculative-tokens", type=length, default="auto", metavar="K",
                       help=f"drafted tokens a round; auto: from 0 to {LONGEST}, whatever is fastest at the time")
    group.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    group.add_argument("--top-k", type=int, default=0, help="0 is off")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("learning")
    group.add_argument("--estimator", choices=ESTIMATORS, default="log", help="a rung of the ladder that python rl.py shows, from the biased textbook to Aurora's KL; each learns from either side")
    group.add_argument("--target-side", type=float, default=1.0, metavar="SHARE", help="of the loss of rounds that drafted that comes from the target's own tokens, 0 to 1; that of plain rounds always does")
    group.add_argument("--lr", type=float, default=argparse.SUPPRESS, help="of Muon (default: 0.03 for a scratch draft, 0.02 for a trained one)")
    group.add_argument("--learn-every", type=int, default=argparse.SUPPRESS, metavar="TOKENS", help="of answers, per step of the optimizer; 0: a step an answer (default: 96 for a scratch draft, 256 for a trained one)")
    group.add_argument("--reservoir", type=int, default=32, metavar="N", help="older requests that are kept in mind beside the last 32; 0 is none")
    group.add_argument("--gate", action=argparse.BooleanOptionalAction, default=True, help="learn only while it shows on new answers; serve what is ahead there, take back what gains nothing, and rest for 64 to 512 answers")
    group.add_argument("--publish-every", type=int, default=1, metavar="M", help="updates per served version")
    group.add_argument("--no-learn", action="store_true")
    group = parser.add_argument_group("measuring and keeping")
    group.add_argument("--compare", action="store_true", help="plain, static and online on the same requests, interleaved")
    group.add_argument("--held-out", type=int, default=2, metavar="N", help="answers a class on which drafts with weights are examined whenever another one serves, outside all times; built-in traffic only; 0 is off")
    group.add_argument("--report", metavar="FILE.json")
    group.add_argument("--log", metavar="FILE.jsonl")
    group.add_argument("--plot", metavar="FILE.png", help="acceptance length over requests (needs matplotlib)")
    group.add_argument("--save", metavar="DIR", help="keep the learned drafts and the learner's state")
    group.add_argument("--export", metavar="DIR", help="write the learned draft as SGLang, vLLM and transformers read it")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="cpu")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default=argparse.SUPPRESS, help="(default: float32; with --compile bfloat16 where the processor multiplies it)")
    group.add_argument("--compile", action="store_true", help="compile the forwards first, minutes the first time, less from then on")
    group.add_argument("--profile", action="store_true", help="only print where a round's time goes, and how it grows with the context")
    group.add_argument("--sweep", action="store_true", help=f"only serve every request at every draft length from 0 to {LONGEST}, and at what auto chooses, in turn; best with --temperature 0, where all say the same")
    group.add_argument("--threads", type=int, default=0, help="0: one for a target under 50M parameters, else as torch chooses")
    args = parser.parse_args(argv)
    scratch = args.draft == "scratch"
    dtype = "bfloat16" if args.compile and fast_bfloat16() else "float32"
    args = argparse.Namespace(**{"learn_every": 96 if scratch else 256, "lr": 0.03 if scratch else 0.02, "dtype": dtype} | vars(args))
    if (args.compile or args.profile) and torch.device(args.device).type != "cpu":
        parser.error("--compile and --profile are for --device cpu")
    for name, low in (("requests", 1), ("max_new_tokens", 1), ("learn_every", 0), ("publish_every", 1), ("held_out", 0), ("reservoir", 0), ("threads", 0), ("top_k", 0), ("draft_vocab", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.num_speculative_tokens != "auto" and args.num_speculative_tokens < 1:
        parser.error(f"--num-speculative-tokens must be auto or at least 1, got {args.num_speculative_tokens}")
    if args.temperature and not 0.01 <= args.temperature < float("inf"):
        parser.error(f"--temperature must be 0 (greedy) or at least 0.01, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p must lie in 0..1 and not be 0, got {args.top_p}")
    if args.compile and args.num_speculative_tokens != "auto" and args.num_speculative_tokens > LONGEST:
        parser.error(f"--compile makes graphs for up to {LONGEST} drafted tokens, got --num-speculative-tokens {args.num_speculative_tokens}")
    if args.draft_vocab and args.draft != "scratch":
        parser.error("--draft-vocab goes with --draft scratch: what a draft can say is fixed when it is made")
    if args.draft == "ngram" and (args.save or args.export):
        parser.error("--draft ngram has no weights: nothing to --save or --export")
    args.no_learn = args.no_learn or args.sweep or args.draft == "ngram"
    if not 0 < args.lr < float("inf"):
        parser.error(f"--lr must be positive, got {args.lr}")
    if not 0 <= args.target_side <= 1:
        parser.error(f"--target-side must lie in 0..1, got {args.target_side}")
    if args.in_turn and (args.prompt is not None or args.prompts is not None):
        parser.error("--in-turn is for the classes of --traffic: the order of --prompts is that of its file")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must lie in 0..2^31-1, got {args.seed}")
    check_outputs(args, parser)
    return args


def check_outputs(args, parser):
    """Before anything is computed: can everything that was asked for be written at the end?"""
    files = [path for path in (args.report, args.log, args.plot) if path is not None]
    if len({Path(path).absolute() for path in files}) < len(files):
        parser.error("--report, --log and --plot must be different files")
    if args.prompt is not None and (files or args.save or args.export or args.compare):
        parser.error("--prompt only answers: it goes with none of --report, --log, --plot, --save, --export, --compare")
    if args.sweep and (files or args.save or args.export or args.compare or args.profile or args.prompt is not None or args.num_speculative_tokens != "auto"):
        parser.error("--sweep only measures, at every draft length: it goes with none of --report, --log, --plot, --save, --export, --compare, --profile, --prompt, --num-speculative-tokens")
    if args.profile and (files or args.save or args.export or args.compare or args.prompt is not None or args.prompts is not None):
        parser.error("--profile only measures: it goes with none of --report, --log, --plot, --save, --export, --compare, --prompt, --prompts")
    for path in files:
        if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
            parser.error(f"cannot write {path}: it is a directory, or the one it should stand in does not exist or is locked")
    if args.save is not None:
        if not args.save:
            parser.error("--save needs a directory")
        if Path(args.save, "latest").exists() and Path(args.save).resolve() != Path(args.draft).resolve():
            parser.error(f"--save {args.save} holds the versions of another run: go on from them with --draft {args.save}, or name a new directory")
        try:
            Path(args.save).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot save in {args.save}: {error.strerror}")
    if args.export is not None:
        if not args.export or Path(args.export).exists() or not os.access(Path(args.export).absolute().parent, os.W_OK):
            parser.error(f"--export needs a directory that is not there yet, in one that can be written, got {args.export!r}")
        if not importlib.util.find_spec("safetensors"):
            parser.error("--export needs safetensors: pip install -r requirements-hf.txt")
    if args.plot:
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            parser.error(f"--plot {args.plot}: expected a name that ends in .png, .svg or .pdf")
        if not importlib.util.find_spec("matplotlib"):
            parser.error("--plot needs matplotlib: pip install -r requirements-plot.txt")


def read_prompts(path):
    """-> [(class, text)]"""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        if path.endswith(".jsonl"):
            objects = [json.loads(line) for line in lines]
            pairs = [(str(o.get("class", "prompts")), o["prompt"]) for o in objects]
        else:
            pairs = [("prompts", line) for line in lines]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f'{path}: expected UTF-8 text, a prompt a line, or in a .jsonl an object with "prompt" a line') from None
    if not pairs or not all(isinstance(text, str) and text for _, text in pairs):
        raise UserError(f"{path}: an empty prompt, or none at all")
    return pairs


def built_in_prompts(args):
    """-> [(class, text)], the same for the same seed.  A class that is named again goes on with new text."""
    kinds = args.traffic.split(",")
    texts = {kind: iter(stretches(kind, "traffic", kinds.count(kind) * args.requests, args.seed)) for kind in dict.fromkeys(kinds)}
    blocks = [[(kind, text) for text in islice(texts[kind], args.requests)] for kind in kinds]
    return list(chain(*(zip(*blocks) if args.in_turn else blocks)))


def stretches(kind, split, count, seed):
    """Stretches of files that start at a line."""
    if kind not in CLASSES:
        raise UserError(f"unknown class of traffic {kind!r}: expected some of {','.join(CLASSES)}")
    texts = [t for t in texts_of(kind, split) if len(t) > 2 * PROMPT_LENGTH]
    if not texts:
        raise UserError(f"this machine has no text of class {kind}: choose others with --traffic, or give --prompts")
    chance, out = random.Random(f"{kind} {seed}"), []
    for text in chance.choices(texts, weights=[len(t) for t in texts], k=count):
        start = text.find("\n", chance.randrange(len(text) - 2 * PROMPT_LENGTH)) + 1
        out.append(text[start : start + PROMPT_LENGTH] or text[:PROMPT_LENGTH])
    return out


def encode(text, tokenizer):
    """-> token ids, at least two, so that there is something that the target has read and a token that follows it."""
    if not text:
        raise UserError("the prompt is empty: give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid Unicode text") from None
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"the prompt {text!r} is only {len(ids)} token: give at least two")
    return ids


def make_requests(pairs, args, tokenizer, context):
    requests = [Request(encode(text, tokenizer), args.max_new_tokens, args.seed * 1_000_003 + i, args.temperature, kind, args.top_p, args.top_k)
                for i, (kind, text) in enumerate(pairs)]
    K = LONGEST if args.num_speculative_tokens == "auto" else args.num_speculative_tokens
    room = context - args.max_new_tokens - 2 * K - 1
    for r in requests:
        if len(r.prompt) > room:
            raise UserError(f"a prompt of {len(r.prompt)} tokens does not fit: the context of {context} "
                            f"leaves {max(0, room)} beside --max-new-tokens {args.max_new_tokens} and {K} drafted tokens")
    return requests


def examined_requests(args, tokenizer, context):
    pairs = [(kind, text) for kind in dict.fromkeys(args.traffic.split(",")) for text in stretches(kind, "eval", args.held_out, args.seed)]
    try:
        return make_requests(pairs, args, tokenizer, context)
    except UserError as error:
        raise UserError(f"{error}; or leave out the examination on held-out text with --held-out 0") from None


def load_models(args):
    try:
        torch.zeros(1, dtype=torch.float64, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise UserError(f"--device {args.device} is not to be had here; try --device cpu") from None
    try:
        kernel(torch.device(args.device).type)  # compiled now if need be, and not within a request's seconds
    except (ValueError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise UserError(f"the acceptance kernel: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    torch.manual_seed(args.seed)  # a scratch draft's weights
    dtype = getattr(torch, args.dtype)
    if is_ours(args.target):
        target, _ = load_target(args.target)
        tokenizer = Bytes(target.config)
    else:
        import checkpoint

        target, tokenizer = checkpoint.load_target(args.target, dtype)
    target = target.to(args.device, dtype).eval()
    if args.threads or is_small(target):
        torch.set_num_threads(args.threads or 1)
    draft, state = find_draft(args.static if args.draft == "static" else args.draft, target, args.draft_vocab)
    static = find_draft(args.static, target)[0].to(args.device) if args.compare else None
    asked = {d.feature_layers for d in (draft, static) if d and d.feature_layers is not None}
    if len(asked) > 1:
        raise UserError("--draft and --static must be of one kind: a head reads what the target thinks, a small model does not")
    target.feature_layers = asked.pop() if asked else ()
    return target, tokenizer, draft.to(args.device), static, state


def new_learner(draft, state, args):
    """As an earlier run left it, if there was one."""
    longest = LONGEST if args.num_speculative_tokens == "auto" else args.num_speculative_tokens
    # Also where nothing is learned: of what an earlier run kept, only the gate knows what served.
    learner = Learner(draft, args.estimator, args.lr, args.target_side, args.learn_every, min(4, longest), reservoir=args.reservoir,
                      horizon=max(1, AVERAGED // (args.learn_every or args.max_new_tokens)), scratch=args.draft == "scratch",
                      gate=args.gate or args.no_learn, seed=args.seed)
    try:
        learner.restore(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"the learner's state beside {args.draft} is another version's ({error}): delete its .learner.pt to go on from the "
                        "draft alone") from None
    return learner


def learner_apart(args):
    """Where another process begins to learn for this one -> its learner, and what makes a trace of what it is sent."""
    os.environ["AURORA_KERNEL"], args.compare = "reference", False  # nothing is accepted there, and no static draft serves
    target, _, draft, _, state = load_models(args)
    return new_learner(draft, state, args), lambda fields: Trace(**fields | {"head": target.logits})


def works_apart(target, args):
    """Beside a small target, served on one thread of a CPU, the learner is another process: two threads of one interpreter
    hold each other up.  A larger one had better not be there twice."""
    return args.device == "cpu" and torch.get_num_threads() == 1 and is_small(target)


def is_small(target):
    """A second thread gains it nothing."""
    return sum(p.numel() for p in target.parameters()) < 50e6


def is_ours(name):
    """A file that this project wrote, or that is missing; all else is a directory, or a name on the hub."""
    return Path(name).is_file() or not Path(name).is_dir() and (name.endswith(".pt") or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name))


def find_draft(name, target, vocabulary=0):
    """-> a draft for the target, and the state of the learner that was kept with it, if any."""
    if name == "scratch":
        return Draft(target, vocabulary=lowest_ids(target.config, vocabulary) if vocabulary else None), {}
    if name == "ngram":
        return NGram(target.config), {}
    if is_ours(name):
        return load_draft(name, target)[0], {}
    if Path(name).is_dir() and not Path(name, "config.json").exists():
        return load_learner(Path(name), target)
    import checkpoint

    return checkpoint.load_draft(name, target), {}


def lowest_ids(config, N):
    """N ids, the end tokens among them, ascending: a byte-pair vocabulary is numbered in the order of its merges, so low
    ids are the common ones."""
    allowed = [i for i in range(config.vocab_size) if i not in config.suppress_tokens]
    if N > len(allowed):
        raise UserError(f"--draft-vocab {N}: the target says only {len(allowed)} ids")
    first = dict.fromkeys([*config.eos_token_ids, *allowed])
    return torch.tensor(sorted(list(first)[:N]))


def stream(target, tokenizer, draft, request, args):
    """Prints the answer as it comes: drafted tokens in one colour, the target's own in another."""
    colours = ("\033[32m", "\033[33m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    draft_length = draft_lengths(target, draft, None, args)["online"]
    put, end = tokenizer.stream()
    begun, left = time.perf_counter(), request.max_new_tokens
    generation = Generation(target, draft, [request], draft_length.longest)
    for ((kept, own),) in decode(generation, draft_length):
        for token, colour in [(t, colours[0]) for t in kept] + [(own, colours[1])]:
            if left > 0:
                print(colour + put(token), end=colours[2], flush=True)
                left -= 1
    print(end(), end="")
    seconds, trace = time.perf_counter() - begun, generation.trace(0)
    print(f"\n\n{request.max_new_tokens - left} tokens in {seconds:.2f} s, {len(trace.starts)} rounds, "
          f"{(request.max_new_tokens - left) / len(trace.starts):.2f} tokens a round", file=sys.stderr)


def facts(target, draft, K, args, requests, compiled):
    order = [kind for kind, _ in groupby(r.kind for r in requests)]
    count = lambda model: sum(p.numel() for p in model.parameters())
    weights = count(target) * target.lm_head.weight.element_size()
    c, layers = target.config, draft.config.num_hidden_layers
    kept_as = str(next((p.dtype for p in draft.parameters() if p.requires_grad), "")).removeprefix("torch.")
    size = f"{count(draft) / 1e6:.1f}M parameters in {'one layer' if layers == 1 else f'{layers} layers'}, {kept_as}" if count(draft) else "prompt lookup"
    said = f", {len(draft.vocabulary)} of {c.vocab_size} ids" if draft.vocabulary is not None else ""
    law = f"temperature {args.temperature}" + (f", top-p {args.top_p}" if args.top_p < 1 else "") + (f", top-k {args.top_k}" if args.top_k else "")
    step = f"{args.learn_every} tokens" if args.learn_every else "answer"
    learning = (f"{args.estimator}, {args.target_side:.0%} from the target side, lr {args.lr:g}, a step every {step}, "
                f"publish-every {args.publish_every}" + ", gated" * args.gate)
    if compiled:
        no_bfloat16 = "" if fast_bfloat16() or args.dtype == "bfloat16" else "; float32, as this processor has no products in bfloat16"
        compiled = f"compile  {compiled}{no_bfloat16}\n"
    print(f"target   {args.target}: {count(target) / 1e6:.1f}M parameters, {c.num_hidden_layers} layers of {c.hidden_size}, "
          f"{args.dtype}, {weights / 1e6:.0f} MB of weights a forward, {args.device}, {torch.get_num_threads()} threads\n"
          f"draft    {args.draft}: {size}{said}, {K}, {law}\n"
          f"verify   {'kernels.cu' if kernel(torch.device(args.device).type) else 'the torch reference'}\n"
          f"{compiled}"
          f"learner  {'off' if args.no_learn else learning}\n"
          f"traffic  {', '.join(order[:9])}{', ..' * (len(order) > 9)}: {len(requests)} requests, {args.max_new_tokens} new tokens each\n")


def main(argv=None):
    args = arguments(argv)
    pairs = [("prompt", args.prompt)] if args.prompt is not None else read_prompts(args.prompts) if args.prompts is not None else None
    target, tokenizer, draft, static, state = load_models(args)
    context = min(m.config.max_position_embeddings for m in (target, draft, static) if m)
    requests = make_requests(pairs or built_in_prompts(args), args, tokenizer, context)
    held_out = examined_requests(args, tokenizer, context) if args.held_out and not pairs and all(hasattr(d, "replay") for d in (draft, static) if d) else []
    served = twin(draft)
    learning = None if args.no_learn else served
    for serves in (m for m in (served, static) if args.compile and m):
        serves.to(target.lm_head.weight.dtype)
    for serves in (m for m in (target, served, static) if m and is_small(target) and args.device == "cpu" and not args.compile):
        by_columns(serves)
    if args.profile:
        return print_profile(target, served, context, args.compile, learning)
    compiled = speed_up(target, served, static, requests, learning) if args.compile else ""
    if args.prompt is not None:
        return stream(target, tokenizer, served, requests[0], args)
    K = draft_lengths(target, served, static, args)
    learner = new_learner(draft, state, args)
    facts(target, served, K["online"], args, requests, compiled)
    if args.sweep:
        return print_sweep(target, served, requests, K["online"])
    exam = examination(target, held_out) if held_out else None
    journal, trouble = Journal(args, len(requests), exam and (lambda: exam(served)), exam and static and exam(static)), None
    study = Study(learner, args.publish_every, (learner_apart, args) if not args.no_learn and works_apart(target, args) else None)
    try:
        aurora(target, served, study, static, requests, K, args, journal)
    except KeyboardInterrupt:
        print("\ninterrupted: this is what was served until now", file=sys.stderr)
    except BrokenExecutor:
        trouble = UserError(DIED)
    except Exception as error:  # raised again below, when what was served is safe
        trouble = error
    whole = study.close()
    journal.close()
    journal.print()
    learned = learner.publish() if whole else served.state_dict()  # without the learner, what served last
    if args.save:
        save_learner(args.save, served, learned, learner.version if whole else study.version, learner.state() if whole else None)
    if args.export:
        import checkpoint

        draft.load_state_dict(learned)
        print(checkpoint.export_draft(draft, args.export, args.draft, min(5, K["online"].longest)))
    if args.report:
        config = vars(args) | {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
        Path(args.report).write_text(json.dumps({"config": config, "classes": journal.report()} | journal.examinations(), indent=1) + "\n")
    if args.plot:
        plot(journal, args.plot)
    if trouble:
        raise trouble


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"aurora: {error}", file=sys.stderr)
        sys.exit(2)
    except NoDistribution as error:
        print(f"aurora: {error}; try --dtype float32, a lower --lr, another --draft", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
