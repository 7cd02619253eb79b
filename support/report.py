"""What happened, for people and for programs: the facts first, a line a request, one table last.

Metrics are vLLM's: acceptance length = 1 + accepted / rounds that drafted; acceptance per position
= rounds that accepted k tokens or more / rounds that drafted; tokens a second count generated
tokens and the seconds of serving and of waiting for the learner and the memory.
"""

import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress

import torch
from tqdm import tqdm

from model import UserError
from support import costs
from support.build import kernel
from support.draft_length import HEAD, PLAIN, REQUEST, SHARED
from support.store import write

SOURCES = {PLAIN: "the target alone", HEAD: "the head", REQUEST: "this text", SHARED: "all texts"}
COLOURS = {HEAD: "\033[32m", REQUEST: "\033[36m", SHARED: "\033[35m", PLAIN: "\033[33m"}


def say(text, end="\n"):
    """Prints, whatever the terminal can encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)


def shown(name):
    """A class name as it may be printed: no control characters, no lone surrogates."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def count(model):
    return sum(p.numel() for p in model.parameters())


def facts(target, draft, length, args, requests):
    c, dtype = target.config, str(target.lm_head.weight.dtype).removeprefix("torch.")
    weights = count(target) * target.lm_head.weight.element_size()
    kinds = [shown(kind) for kind in dict.fromkeys(r.kind for r in requests)]
    head = f"{count(draft) / 1e6:.1f}M parameters of its own" if draft else "none"
    cuts = f", top-p {args.top_p}, top-k {args.top_k}"
    law = f"temperature {args.temperature}" + cuts * (args.top_p < 1 or args.top_k > 0)
    which = "kernels.cu" if kernel(torch.device(args.device).type) else "torch"
    learning = f"{args.estimator}, lr {args.lr:g}, a step every {args.learn_every} tokens"
    if args.no_learn or draft is None:
        learning = "off"
    say(f"target   {args.target}: {count(target) / 1e6:.1f}M parameters, {c.num_hidden_layers} "
        f"layers of {c.hidden_size}, {dtype}, {weights / 1e6:.0f} MB a token, {args.device}, "
        f"{torch.get_num_threads()} threads\n"
        f"draft    {args.draft}: {head}; memory: {args.memory}\n"
        f"verify   {args.rule} rule by {which}, {law}; {length}\n"
        f"learner  {learning}\n"
        f"traffic  {len(requests)} requests of {args.max_new_tokens} tokens: {', '.join(kinds)}\n")


def line_of(name, served):
    """One request as --log has it."""
    generation, r = served.generation, served.request
    rounds = generation.rounds[0]
    drafted = [x for x in rounds if x.drafted]
    histogram = Counter(x.accepted for x in drafted)
    longest = max((x.drafted for x in drafted), default=0)
    accepted, outcome = sum(x.accepted for x in drafted), served.outcome
    wrote = {s: sum(x.accepted for x in drafted if x.source == s) for s in SOURCES if s != PLAIN}
    return {
        "arm": name, "class": r.kind, "seed": r.seed, "version": served.version,
        "tokens": len(generation.answer()), "rounds": len(drafted),
        "plain_rounds": len(rounds) - len(drafted), "accepted": accepted,
        "drafted": sum(x.drafted for x in drafted),
        "acceptance_histogram": [histogram[n] for n in range(longest + 1)],
        "mean_acceptance_length": 1 + accepted / max(1, len(drafted)),
        "tokens_by_source": wrote | {PLAIN: len(generation.answer()) - sum(wrote.values())},
        "serve_seconds": served.seconds, "wait_seconds": served.waited,
        "remember_seconds": served.remembered,
        "learned_before": None if outcome is None else {
            "expected_length": outcome.expected_length, "loss": outcome.loss,
            "dropped": outcome.dropped, "version": outcome.version, "seconds": outcome.seconds,
            "judging_seconds": outcome.judging,
        },
    }


def summary(lines):
    """Totals of some requests of one arm."""
    total = {k: sum(line[k] for line in lines) for k in (
        "tokens", "rounds", "plain_rounds", "accepted", "drafted", "serve_seconds", "wait_seconds")}
    rounds, seconds = max(1, total["rounds"]), total["serve_seconds"] + total["wait_seconds"]
    sources, histogram = Counter(), Counter()
    for line in lines:
        sources.update(line["tokens_by_source"])
        histogram.update(dict(enumerate(line["acceptance_histogram"])))
    at_least = [sum(n for k, n in histogram.items() if k >= i) for i in range(1, len(histogram))]
    learned = [line["learned_before"] for line in lines if line["learned_before"]]
    return total | {
        "requests": len(lines), "tokens_per_second": total["tokens"] / max(1e-9, seconds),
        "mean_acceptance_length": 1 + total["accepted"] / rounds,
        "tokens_per_round": total["tokens"] / max(1, total["rounds"] + total["plain_rounds"]),
        "acceptance_per_position": [n / rounds for n in at_least],
        "draft_acceptance_rate": total["accepted"] / max(1, total["drafted"]),
        "tokens_by_source": dict(sources),
        "learn_seconds": sum(outcome["seconds"] for outcome in learned),
    }


class Journal:
    """A line a request and arm: the bar and the log while it runs, the table at the end."""

    def __init__(self, args, total, memory):
        self.args, self.lines, self.memory = args, [], memory
        self.written, self.seconds_writing = 0, 0.0  # bytes; log, lineage and versions
        self.held = 0.0  # megabytes, by the learner's process
        self.log = open(args.log, "w") if args.log else None
        self.bar = tqdm(total=total, unit="request", disable=None)

    def record(self, name, served):
        line = line_of(name, served)
        self.lines.append(line)
        self.held = max(self.held, served.outcome.held if served.outcome else 0.0)
        self.put(line)
        if name == "online":
            recent = summary([x for x in self.lines if x["arm"] == name][-8:])
            speeds = self.speeds()
            now, plain = speeds["tokens_per_second"], speeds["plain_tokens_per_second"]
            beside = f", {now / plain:.2f} of plain" if plain else ""
            self.bar.set_postfix_str(
                f"{shown(line['class'])}: {recent['tokens_per_round']:.2f} tokens a round, "
                f"{now:.0f} tokens/s{beside}")
            self.bar.update()

    def put(self, line):
        """Into --log.  On a full disk it ends there, and serving goes on."""
        try:
            if self.log:
                self.written += self.log.write(json.dumps(line) + "\n")
                self.log.flush()
        except OSError as error:
            with suppress(OSError):
                self.log.close()
            self.log = None
            print(f"\naurora: the log ends here, serving goes on: cannot write {self.args.log}: "
                  f"{error.strerror}", file=sys.stderr)

    @contextmanager
    def writing(self):
        start = time.perf_counter()
        yield
        self.seconds_writing += time.perf_counter() - start

    def costs(self):
        return costs.table(self.lines, self.memory, self.held, self.seconds_writing, self.written)

    def speeds(self):
        """Of the last 8 requests, and of plain decoding of the class at hand, None if none was."""
        recent = [x for x in self.lines if x["arm"] == "online"][-8:]
        plain = self.of(recent[-1]["class"], "plain") if recent else []
        return {"tokens_per_second": summary(recent)["tokens_per_second"],
                "plain_tokens_per_second": summary(plain)["tokens_per_second"] if plain else None}

    def plain_is_due(self):
        """A few plain requests stand beside the others throughout, so that the ratio is fair."""
        online = sum(line["arm"] == "online" for line in self.lines)
        return online % 3 == 1

    def of(self, kind, arm):
        return [x for x in self.lines if x["class"] == kind and x["arm"] == arm]

    def table(self):
        kinds = dict.fromkeys(line["class"] for line in self.lines)
        arms = [a for a in ("plain", "static", "online") if any(x["arm"] == a for x in self.lines)]
        return {k: {a: summary(self.of(k, a)) for a in arms if self.of(k, a)} for k in kinds}

    def close(self):
        self.bar.close()
        if self.log:
            self.log.close()

    def print(self):
        if not self.lines:
            return
        form = "{:10s} {:8s} {:>8s} {:>9s} {:>8s} {:>12s} {:>11s}   {}"
        say(form.format("class", "arm", "requests", "tokens/s", "x plain", "tokens/round",
                        "accept.len", "tokens by source"))
        for kind, arms in self.table().items():
            for arm, s in arms.items():
                ratio = "-"
                if "plain" in arms:
                    plain = arms["plain"]["tokens_per_second"]
                    ratio = f"{s['tokens_per_second'] / plain:.2f}"
                total = max(1, s["tokens"])
                shares = [(x, n / total) for x, n in s["tokens_by_source"].items() if n]
                said = ", ".join(f"{SOURCES[x]} {share:.0%}" for x, share in shares)
                say(form.format(shown(kind), arm, str(s["requests"]),
                                f"{s['tokens_per_second']:.1f}", ratio,
                                f"{s['tokens_per_round']:.2f}",
                                f"{s['mean_acceptance_length']:.2f}", said))
        say("\n" + self.sentence())
        if self.args.report:
            say("\n" + costs.rows(self.costs()))

    def sentence(self):
        """What it came to, in plain words: the last third of the requests."""
        online = [x for x in self.lines if x["arm"] == "online"]
        last = online[-max(1, len(online) // 3) :]
        kinds = {x["class"] for x in last}
        plain = [x for x in self.lines if x["arm"] == "plain" and x["class"] in kinds]
        if not plain:
            return ""
        now, base = summary(last), summary(plain)
        ratio = now["tokens_per_second"] / base["tokens_per_second"]
        share = {s: n / max(1, now["tokens"]) for s, n in now["tokens_by_source"].items()}
        return (f"Plain decoding made {base['tokens_per_second']:.0f} tokens a second; over the "
                f"last {len(last)} requests Aurora made {now['tokens_per_second']:.0f}, "
                f"{ratio:.2f} times as many.\nOf 100 tokens the memory guessed "
                f"{100 * (share[REQUEST] + share[SHARED]):.0f} and the head "
                f"{100 * share[HEAD]:.0f}; the target wrote {100 * share[PLAIN]:.0f} itself, "
                f"{now['tokens_per_round']:.2f} tokens a forward pass with what it confirmed.")

    def write_report(self):
        if self.args.report:
            config = vars(self.args) | {"torch": str(torch.__version__)}
            content = {"config": config, "classes": self.table(), "costs": self.costs()}
            path = os.path.realpath(self.args.report)  # a link stays one
            write(path, json.dumps(content, indent=1) + "\n")


def stream(generations, tokenizer):
    """Prints an answer as it comes, coloured on a terminal by who wrote what."""
    tty, (put, end) = sys.stdout.isatty(), tokenizer.stream()
    start, said = time.perf_counter(), 0
    for generation in generations:
        done, answer = generation.rounds[0][-1], generation.answer()
        for i, token in enumerate(answer[said:]):
            by = done.source if i < done.accepted else PLAIN
            text = put(token)
            say(f"{COLOURS[by]}{text}\033[0m" if tty else text, end="")
        said = len(answer)
    say(end(), end="")
    seconds, rounds = time.perf_counter() - start, len(generation.rounds[0])
    legend = "  ".join(f"{COLOURS[s]}{SOURCES[s]}\033[0m" for s in SOURCES) if tty else ""
    print(f"\n\n{said} tokens in {seconds:.2f} s, {said / rounds:.2f} a round  {legend}",
          file=sys.stderr)


def export(draft, target, args):
    from formats.export import export_draft

    try:
        say(export_draft(draft, args.export, args.draft, args.temperature, target))
    except OSError as error:
        raise UserError(f"cannot write {args.export}: {error.strerror}") from None
