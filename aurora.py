"""Aurora: a draft model that learns while it serves.

    python aurora.py                                a draft that starts from nothing, as it learns
    python aurora.py --draft static --compare       plain, static and online, on the same requests
    python aurora.py --prompt "def main():"         one answer, coloured by who wrote what
    python aurora.py --target DIR --prompts FILE    a Hugging Face checkpoint, your own prompts

For every request, round by round until its answer is complete: draft up to K tokens, verify them
with the target, commit what it accepts and one token of its own.  Then the memory has the answer at
once, and the learner takes its trace to another core while the next request is served; what it
learned serves from then on, if it is ahead on answers that it has not learned from.

The method is Aurora's (2602.06932).  Departures: 1. a policy gradient of the accepted length where
its public code distils; 2. block verification; 3. a memory beside the head; 4. a gate, and a draft
length that is found as it goes; 5. chains, one machine, one request at a time.

Letters: B batch rows, T tokens, K drafted tokens a round, R rounds, V vocabulary, D hidden width.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall a small model
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all this is imported

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from formats.find import find_draft, find_target
from generation import Generation, Request, seconds_per_round
from learner import Learner
from memory import Memory
from model import TargetHead, UserError, by_columns
from support import explain, options, report
from support.background import Background
from support.build import kernel
from support.command import command, complain, deaf
from support.draft_length import HEAD, DraftLength, FixedLength
from support.lineage import Lineage
from support.precision import ready_to_serve, replay_dtype
from support.store import Store
from verify import NoDistribution


@dataclass
class Served:
    request: Request
    generation: Generation
    seconds: float
    version: int  # of the draft that served
    waited: float = 0.0  # more seconds: for the learner, and to remember
    remembered: float = 0.0  # of these
    outcome: object = None  # what the learner made of the answer before


@dataclass
class Arm:
    """A way to serve: a draft or none, memory of the request or of all, a rule for the length."""

    draft: object = None
    length: object = field(default_factory=lambda: FixedLength(0))
    own_memory: bool = False
    shared: Memory | None = None
    rule: str = "block"
    version: int = 0  # of the draft

    def decode(self, target, requests):
        """Serves; yields the Generation after every round."""
        generation = Generation(
            target, self.draft, requests, self.own_memory, self.shared, self.rule)
        self.length.begin()
        while not generation.done:
            plan = self.length.choose(generation.recall())
            drafted = generation.draft_tokens(plan)
            accepted, own, thought = generation.verify(drafted)
            generation.commit(drafted, accepted, own, thought)
            widths = (drafted.tokens >= 0).sum(1).tolist()
            self.length.observe(plan, widths, accepted)
            yield generation

    def serve(self, target, request):
        start = time.perf_counter()
        for generation in self.decode(target, [request]):
            pass
        return Served(request, generation, time.perf_counter() - start, self.version)

    def remember(self, served):
        """What was said is in the shared memory for the requests to come."""
        start = time.perf_counter()
        if self.shared:
            self.shared.remember(served.generation.text[0])
        served.remembered = time.perf_counter() - start

    def publish(self, outcome):
        """The weights that the learner wants to serve do so, if they are others."""
        if outcome and outcome.weights:
            self.draft.load_state_dict(outcome.weights)
            self.version = outcome.version


def aurora(target, arm, learner, requests):
    """The algorithm: every request is served by the newest version of the draft, while another core
    learns from the answer before.  learner: a Background, or None.  Yields what was Served.

    The learner is asked for its result after the request is served: so the two overlap."""
    trace = None
    for request in requests:
        start = time.perf_counter()
        if trace:
            learner.submit(trace)  # on another core
        served = arm.serve(target, request)  # draft, verify, commit
        if learner:
            served.outcome = learner.result()  # update, gate
            arm.publish(served.outcome)
            trace = served.generation.trace()
        arm.remember(served)
        served.waited = time.perf_counter() - start - served.seconds
        yield served
    if trace:
        learner.submit(trace)


# ---- from the command line to the loop -----------------------------------------------------------


def make_requests(args, tokenizer, context):
    requests = []
    for i, (kind, said) in enumerate(options.prompts(args)):
        ids, seed = options.encode(said, tokenizer), args.seed * 1_000_003 + i
        if len(ids) + args.max_new_tokens > context:
            raise UserError(f"a prompt of {len(ids)} tokens and --max-new-tokens "
                            f"{args.max_new_tokens} do not fit into the context of {context}")
        requests.append(Request(ids, args.max_new_tokens, seed, args.temperature, kind,
                                args.top_p, args.top_k))
    return requests


def make_arm(target, draft, args, costs=None):
    memory = args.memory != "off"
    if args.num_speculative_tokens == "auto" and (draft or memory):
        costs = costs or seconds_per_round(target, draft, args.temperature, args.rule)
        length = DraftLength({s: t for s, t in costs.items() if s == HEAD or memory})
    else:
        length = FixedLength(args.num_speculative_tokens if draft else 0)
    shared = Memory(args.memory_tokens) if args.memory == "shared" else None
    return Arm(draft, length, memory, shared, args.rule), costs


def make_learner(draft, state, target, args, first=0):
    """A Background that learns on this draft, as an earlier run left it if there was one.
    first: no version of its may have a lower number."""
    learner = Learner(draft, TargetHead(target), args.estimator, args.rule, args.lr,
                      args.learn_every, fresh=args.draft == "scratch", gate=not args.no_gate,
                      seed=args.seed, precision=replay_dtype(args.device))
    try:
        if state:
            learner.restore(state)
    except Exception as error:  # whatever another version's state runs into
        what = f"its learner.pt is another version's ({type(error).__name__})"
        raise UserError(f"{args.draft}: {what}") from None
    learner.first = first
    return Background(learner, process=args.device == "cpu")


def main(argv=None):
    args = options.arguments(argv)
    if args.explain:
        return explain.tell(args.explain, args.version)
    if args.rollback:
        with Store(args.rollback[0], new=False) as store:
            return report.say(store.roll_back(int(args.rollback[1])))
    options.check_device(args.device)
    torch.manual_seed(args.seed)  # a fresh draft's weights
    target, tokenizer = find_target(args.target, args.dtype)
    target = ready_to_serve(target, args.device, args.dtype)
    draft, state = find_draft(args.draft, target, args.draft_vocab)
    static = draft
    if args.compare and args.static:
        static, _ = find_draft(args.static, target)
    models = [m.to(args.device) for m in (draft, static) if m]
    context = min(m.config.max_position_embeddings for m in (target, *models))
    requests = make_requests(args, tokenizer, context)
    served, static = (m.clone() if m else None for m in (draft, static))
    for model in filter(None, (target, served, static)):
        by_columns(model)
    kernel(torch.device(args.device).type)  # compiled now if need be, in nobody's seconds

    with ExitStack() as stack:
        store = stack.enter_context(Store(args.save)) if args.save else None
        arm, costs = make_arm(target, served, args)
        if args.prompt is not None:
            return report.stream(arm.decode(target, requests), tokenizer)
        learner, others = None, {"plain": Arm()}
        if draft and not args.no_learn:
            learner = make_learner(draft, state, target, args, store.first if store else 0)
            served.load_state_dict(learner.learner.serves.state_dict())
        arm.version = state["version"] if state else 0
        if args.compare:
            others["static"] = make_arm(target, static, args, costs)[0]
        report.facts(target, served, arm.length, args, requests)
        run(target, arm, learner, state, requests, others, args, store)


def run(target, arm, learner, state, requests, others, args, store):
    """Serves.  Then, even after an error or Ctrl-C, keeps what was learned, and only then reports;
    the first error is raised at the end."""
    journal, trouble = report.Journal(args, len(requests), arm.shared), []
    known = arm.version if state else None
    lineage = Lineage(args.save, args, arm.draft, known) if store else None
    try:
        for served in aurora(target, arm, learner, requests):
            with journal.writing():
                journal.record("online", served)
                if lineage:
                    lineage.serve(served, journal.speeds(), learner and learner.trouble)
            if args.compare or journal.plain_is_due():
                for name, other in others.items():
                    journal.record(name, other.serve(target, served.request))
    except KeyboardInterrupt:
        complain("\ninterrupted: this is what was served until now")
    except Exception as error:  # raised again below, when what was learned is safe
        trouble.append(error)

    def learned():
        nonlocal state
        try:
            outcome = learner.result()
            arm.publish(outcome)
            if lineage:
                lineage.learn(outcome, journal.speeds(), learner.trouble)
        finally:
            state = learner.close()

    def keep():
        with journal.writing():
            number, lost = store.write(arm.version, arm.draft, state)
        journal.written += store.written + lineage.written
        lineage.keep(number, arm.draft, journal.costs(), lost)
        if lost:
            raise lost

    steps = [learned] if learner else []
    steps += [keep] if store else []
    if args.export:
        steps.append(lambda: report.export(arm.draft, target, args))
    with deaf():  # a second Ctrl-C comes too late
        for step in [*steps, journal.close, journal.print, journal.write_report]:
            try:
                step()
            except Exception as error:  # one that fails never loses another
                trouble.append(error)
    if trouble:
        raise trouble[0]


if __name__ == "__main__":
    command(main, "aurora", errors=(NoDistribution,))
