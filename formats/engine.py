"""Beside an engine: a learner that reads what it served, and writes heads that it can load.

    python -m formats.engine learn DIR --target TARGET --draft scratch --export OUT

The engine leaves a file a request in DIR (docs/engines.md).  Each teaches the draft once, under the
gate, and whenever what serves changes OUT has a new version:

    OUT/v000012/     as SGLang and vLLM read it; under this name only when it is whole
    OUT/latest       the name of the newest version
    OUT/learner.pt   where the learner stands; started again, it goes on from there

Of the target only embedding, last norm and head are used; it is never run.
"""

import argparse
import shutil
import signal
import time
from collections import deque
from pathlib import Path

import torch
from tqdm import tqdm

from formats.export import export_draft
from formats.find import find_draft, find_target
from formats.hidden_states import new_files, read_trace, remove
from learner import Learner
from model import TargetHead, UserError
from support import options
from support.command import ENDINGS, command
from support.precision import replay_dtype
from support.store import Store, number_of, printable, write

LOOK = 0.5  # seconds until a folder that held nothing new is looked at again


class Beside:
    """A learner, the files that it has seen, and the versions that it has written."""

    def __init__(self, args, target, learner, store):
        self.args, self.target, self.learner = args, target, learner
        self.directory, self.out, self.number = Path(args.directory), store.directory, store.first
        self.seen, self.read, self.skipped, self.answers = {}, [], 0, 0
        self.changed = store.first == 0  # day 0: the engine has something to load
        self.expected = deque(maxlen=8)  # tokens a round, of the last answers

    def restore(self):
        """Goes on where an earlier run stood, if there was one."""
        path = self.out / "learner.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self.learner.restore(state["learner"])
            self.seen, self.answers = state["seen"], state["answers"]
        except Exception as error:  # whatever another draft's state runs into
            raise UserError(f"{path} is another draft's, or another version's "
                            f"({type(error).__name__}): name an --export that is not there yet"
                            ) from None

    def take(self, path, stamp):
        """One file teaches, or is skipped in one line -> whether another of the learner's drafts
        serves from now on."""
        self.seen[path.name], served = stamp, self.learner.serves
        law = self.args.temperature, self.args.top_p, self.args.top_k
        context = self.learner.draft.config.max_position_embeddings
        try:
            trace = read_trace(path, self.target, law, context)
            outcome = self.learner.update(trace)
        except UserError as error:
            self.skipped += 1
            tqdm.write(f"{printable(path.name)} skipped: {error}")
            return False
        self.read.append(path)
        self.answers += 1
        self.expected.append(outcome.expected_length)
        self.changed |= outcome.weights is not None
        if outcome.dropped:
            tqdm.write(f"answer {self.answers}: what was learned is behind what it began with, and "
                       f"dropped; learning pauses for {self.learner.gate.paused} answers")
        return self.learner.serves is not served

    def keep(self):
        """Writes what serves, if it has changed, then where the learner stands; then read files
        may go.  Killed anywhere in between, it learns again what came after the last state."""
        if self.changed:
            self.write_version()
        self.seen = {n: s for n, s in self.seen.items() if (self.directory / n).exists()}
        state = {"learner": self.learner.state(), "seen": self.seen, "answers": self.answers}
        write(self.out / "learner.pt", state)
        for path in self.read if self.args.delete else ():
            remove(path)
        self.read.clear()

    def write_version(self):
        version, args = self.out / f"v{self.number:06d}", self.args
        how = export_draft(self.learner.serves, version, args.draft, args.temperature, self.target,
                           args.num_speculative_tokens)
        write(self.out / "latest", version.name + "\n")
        tqdm.write(how if self.number == 0 else f"{version}: {self.standing()}")
        self.number, self.changed = self.number + 1, False
        versions = [path for path in self.out.glob("v*") if number_of(path) >= 0]
        for old in sorted(versions, key=number_of)[: -args.keep]:
            shutil.rmtree(old)

    def standing(self):
        mean = sum(self.expected) / max(1, len(self.expected))
        serves = "learned" if self.learner.serves is self.learner.average else "as it began"
        return f"{self.answers} answers, {mean:.2f} tokens a round to expect, {serves}"


def follow(beside, args, heard):
    """Learns from what is there and what comes, until a signal was `heard` or, with --once, nothing
    new is there.  A file that was begun is learned from to its end."""
    bar, taken = tqdm(unit="file", disable=None), 0
    try:
        beside.keep()
        while not heard:
            files = new_files(beside.directory, beside.seen)
            for i, (stamp, path) in enumerate(files):
                if heard:
                    break
                another, taken = beside.take(path, stamp), taken + 1
                if another or taken % args.every == 0:
                    beside.keep()
                bar.set_postfix_str(f"{beside.standing()}, {len(files) - i - 1} files waiting")
                bar.update()
            if not files and args.once:
                break
            if not files:
                time.sleep(LOOK)
    finally:
        bar.close()
        beside.keep()
        print(f"{beside.standing()}; {beside.skipped} files skipped; {beside.out} holds it all")


# ---- the command line ----------------------------------------------------------------------------


def arguments(argv):
    parser = options.Parser(
        prog="python -m formats.engine", description="A learner beside an engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("command", choices=["learn"])
    parser.add_argument("directory", metavar="DIR", help="where the engine writes hidden states")

    add = parser.add_argument_group("models").add_argument
    add("--target", required=True, metavar="FILE|DIR|NAME", help="what the engine serves")
    add("--draft", required=True, metavar="scratch|static|FILE|DIR|NAME",
        help="where the head begins")
    add("--draft-vocab", type=options.whole(0), default=0, metavar="N",
        help="ids that a scratch head can say, the lowest ones; 0 is all")
    add("--export", required=True, metavar="OUT",
        help="versions, and where the learner stands: one that has them is gone on with")

    add = parser.add_argument_group("as the engine serves").add_argument
    add("--num-speculative-tokens", type=options.whole(1, 64), default=4, metavar="K")
    add("--temperature", type=options.temperature, default=1.0, help="0 is greedy")
    add("--top-p", type=options.real(1e-6, 1), default=1.0, help="1 is off")
    add("--top-k", type=options.whole(0), default=0, help="0 is off")

    add = parser.add_argument_group("learning and keeping").add_argument
    add("--lr", type=options.real(1e-8, 10), help="of Muon (default: 0.02 for scratch, else 0.005)")
    add("--learn-every", type=options.whole(1), default=options.LEARN_EVERY, metavar="TOKENS",
        help="of answers, a step of the optimizer")
    add("--every", type=options.whole(1), default=1, metavar="FILES",
        help="until a version and the learner's state are written; what the gate says, at once")
    add("--keep", type=options.whole(1), default=3, metavar="VERSIONS", help="older ones go")
    add("--delete", action="store_true", help="files go once the state that knows them is written")
    add("--once", action="store_true", help="end when nothing new is there")
    add("--seed", type=options.whole(0), default=0)

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the target")
    args = parser.parse_args(argv)
    options.how_fast(args)
    if args.draft == "none":
        raise UserError("--draft none has no weights: nothing to learn")
    if not Path(args.directory).is_dir():
        raise UserError(f"{args.directory} is no folder: make it, and let the engine write there")
    return args


def main(argv=None, heard=()):
    """heard: a list that is not empty any more when it is time to end."""
    args = arguments(argv)
    options.check_device(args.device)
    torch.manual_seed(args.seed)  # a fresh head's weights
    target, _ = find_target(args.target, args.dtype)
    draft, _ = find_draft(args.draft, target, args.draft_vocab)
    del target.model.layers  # it is never run
    target, draft = target.to(args.device).eval(), draft.to(args.device)
    learner = Learner(  # log: on day 0 a head is far off, where the exact gradient vanishes
        draft, TargetHead(target), "log", lr=args.lr, every=args.learn_every,
        chain=args.num_speculative_tokens, fresh=args.draft == "scratch", seed=args.seed,
        precision=replay_dtype(args.device))
    with Store(args.export) as store:
        beside = Beside(args, target, learner, store)
        beside.restore()
        follow(beside, args, heard)


def program():
    heard = []
    for ending in ENDINGS:
        signal.signal(ending, lambda number, _: heard.append(number))
    torch.set_flush_denormal(True)  # numbers under 1e-38 take a processor far longer
    main(heard=heard)


if __name__ == "__main__":
    command(program, "formats.engine")
