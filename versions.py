"""Versions of the draft: the gate decides which weights serve, Study runs the learner beside serving, --save writes them to disk.

Learning costs time, and steps that have nothing to learn still shake a draft that was as good as it can be.  So what is
learned has to show, on answers that it has not learned from yet, or it is taken back.
"""

import io
import os
import signal
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from math import log2
from multiprocessing import get_context
from pathlib import Path

import torch

from draft import load_draft
from model import UserError, save

EARLIEST, PATIENCE = 8, 32  # answers before the first verdict, and after which what is learned must be ahead
BETTER = 2.5  # standard errors
FIRST_REST, LONGEST_REST = 64, 512  # answers
RECENT, REMEMBERED, SHIFT = 8, 72, 4.0  # a shift of traffic: the last 8 answers lie 4 standard errors off up to 64 before them


class Gate:
    """Learning goes on as long as it shows; otherwise what was learned is taken back, and the learner rests.

    Three drafts: the *current* one is what is learned by now; the *anchor* is what it must beat, the draft that began or that
    proved better since; the *fallback* is the draft that the run began with, if that was a trained one, or what it replaced.

    On every new answer, before it is learned from, the expected tokens a round of both current and anchor are computed, by
    the same text, which neither has learned from.  Their differences d_1 .. d_n since the two parted are a fair comparison with
    little noise: z = sum d / sqrt(sum d^2), at any n about standard normal where the two are equal.  Whichever is ahead serves:
    current where z > 0, else anchor, so that steps which lead nowhere cost their time but hardly any acceptance.  The fallback
    is compared likewise with what serves; its differences are summed up anew whenever they sum to less than nothing (Page
    1954), so that what was long ago does not weigh.  From 8 differences on:

        verdict         if                                  then
        better          z > 2.5                             the anchor is the current draft
        nothing gained  z < log2(n / 32)                    the current draft is the anchor; no learning for 64 answers, for twice
                        and not the fallback's z > 1        as many each time that this is so again, up to 512
        falls back      the fallback's z > 2.5              current and anchor are the fallback, what served is the fallback

    The second bound is at -2 when n = 8 and rises by 1 as n doubles: progress shows the better, the longer it lasts.  Where
    there is none, learning ends after 30 answers or so, and hardly ever lasts to where the two bounds meet, at 181.  Of equals
    one comparison in twenty-five ends in "better" all the same.

    A rest ends early when traffic shifts: the draft stands still then, and hardly moved before if nothing was gained, so what
    moves is the traffic."""

    def __init__(self):
        self.resting, self.rest, self.ahead = 0, FIRST_REST, False
        self.gains = []  # d_1, d_2, ..
        self.leads = []  # the fallback's, since they last summed to less than nothing
        self.kept = []  # of every answer: rounds whose first drafted token was kept, and all that drafted

    def rests(self, kept, tested):
        """One more answer, in so many of whose rounds the first drafted token was put to the test: is it left alone?"""
        if tested:
            self.kept = [*self.kept, (kept, tested)][-REMEMBERED:]
        if not self.resting:
            return False
        self.resting -= 1
        if not self.shifted():
            return True
        self.resting, self.rest, self.kept = 0, FIRST_REST, []
        return False

    def shifted(self):
        """Is the kept share of the last 8 answers 4 standard errors off that of up to 64, and at least 16, before?"""
        if len(self.kept) < 3 * RECENT:
            return False
        kept, tested = torch.tensor(self.kept, dtype=torch.float64).T
        before, now = slice(None, -RECENT), slice(-RECENT, None)
        share = kept[before].sum() / tested[before].sum()
        p = (kept.sum() + 1) / (tested.sum() + 2)
        # Answers differ by more than the coins of their tokens, but never by less.
        spread = (kept - share * tested)[before].square().mean().clamp(min=p * (1 - p) * tested.mean())
        error = (spread * RECENT * (1 + RECENT / len(kept[before]))) ** 0.5
        return bool((kept - share * tested)[now].sum().abs() > SHIFT * error)

    def judge(self, gain, lead=0.0):
        """gain: how many more tokens a round to expect of the current draft than of the anchor, on this answer, None while they are
        one and the same; lead: of the fallback than of what serves -> "better", "falls back", "nothing gained" or, too early to
        say, "learns"."""
        self.leads = [*self.leads, lead]
        if sum(self.leads) <= 0:
            self.leads = []
        if gain is not None:
            self.gains = [*self.gains, gain]
            self.ahead = standard(self.gains) > 0
        n, z = len(self.gains), standard(self.gains)
        if len(self.leads) >= EARLIEST and standard(self.leads) > BETTER:
            verdict = "falls back"
        elif n >= EARLIEST and z > BETTER:
            verdict = "better"
        elif n >= EARLIEST and z < log2(n / PATIENCE) and standard(self.leads) <= 1:
            verdict = "nothing gained"
        else:
            return "learns"
        self.gains, self.ahead = [], verdict == "better"
        if verdict == "falls back":
            self.leads, self.kept = [], []  # another draft keeps more, which is no shift of traffic
        if verdict == "nothing gained":
            self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)
        else:
            self.rest = FIRST_REST
        return verdict


def standard(differences):
    """Their sum in standard errors, about standard normal where the two are equal."""
    return sum(differences) / max(1e-12, sum(d * d for d in differences)) ** 0.5


# ---- on another core ---------------------------------------------------------------------------------


DIED = "the process that learns died; is there memory for it?  --no-learn serves without it"


class Study:
    """Where the learner works while requests are served, an answer behind: `begin` gives it the trace of one; `end` waits for
    what it made of that, and lets it serve if it is due, after `every` updates.

    apart: None, and the learner is a thread; or (make, its argument), and it is another process: make(argument) -> the learner,
    and a function from a trace's fields, `head` left out, to the trace.  After `close` the one here has its state, but not its memory."""

    def __init__(self, learner, every, apart=None):
        self.learner, self.every, self.version, self.apart, self.doing = learner, every, learner.version, apart, None
        if apart:
            self.core = ProcessPoolExecutor(1, get_context("spawn"), init_process, apart)
            try:
                self.core.submit(os.getpid).result()  # it is there
            except BrokenExecutor:
                raise UserError(DIED) from None
        else:
            self.core = ThreadPoolExecutor(1, initializer=init_thread, initargs=[torch.get_num_threads()])

    def begin(self, trace=None, line=None):
        """line: the answer's, in the journal.  Without a trace there is nothing to do."""
        if trace:
            begun, self.line = time.perf_counter(), line
            task = (study_apart, packed(vars(trace) | {"head": None})) if self.apart else (study, self.learner, trace)
            self.doing, self.waited = self.core.submit(*task, self.every), time.perf_counter() - begun

    def end(self, served, draft_length, journal):
        doing, self.doing = self.doing, None
        if doing:
            begun, told = time.perf_counter(), doing.result()
            outcome, published = unpacked(told) if self.apart else told
            if published:
                weights, self.version, acceptance = published
                served.load_state_dict(weights)
                draft_length.trust(acceptance)
            journal.learned(self.line, published is not None, self.waited + time.perf_counter() - begun, **outcome)

    def close(self):
        """-> is the learner here, then, as the one there?  Not if that process died."""
        with self.core:
            try:
                if self.apart:
                    state, self.learner.unpublished = unpacked(self.core.submit(state_apart).result())
                    self.learner.restore(state)
            except BrokenExecutor:
                return False
        return True


def study(learner, trace, every):
    """-> what the learner made of an answer; if others are due to serve (weights, version, acceptance), else None."""
    outcome = learner.update(trace)
    due = learner.unpublished >= every
    return outcome, (learner.publish(), learner.version, learner.acceptance) if due else None


def init_thread(threads):
    """What the thread that learns has of its own."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # numbers under 1e-38, of what a draft is sure not to say, take a processor far longer


def init_process(make, argument):
    """Where the other process begins; what it works with is `process_state`."""
    global process_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that serves
    process_state = make(argument)
    init_thread(torch.get_num_threads())


def study_apart(fields, every):
    learner, trace_of = process_state
    return packed(study(learner, trace_of(unpacked(fields)), every))


def state_apart():
    learner, _ = process_state
    return packed((learner.state(), learner.unpublished))


def packed(tensors):
    """What passes between the processes: nothing but tensors, numbers and names can be in it."""
    data = io.BytesIO()
    torch.save(tensors, data)
    return data.getvalue()


def unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=True)


# ---- on disk -----------------------------------------------------------------------------------------


def save_learner(directory, served, learned, version, state):
    """v000123/draft.pt, the learner's state beside it unless that was lost, then `latest`: what `latest` names is always whole."""
    name = f"v{version:06d}"
    save(Path(directory) / name / "draft.pt", served.config, learned, {"version": version, "kind": served.kind})
    beside = Path(f"{directory}/{name}.learner.pt")
    if state:
        torch.save(state, f"{directory}/learner.new")
        Path(f"{directory}/learner.new").replace(beside)
    else:
        beside.unlink(missing_ok=True)  # of another run's version of that number
    Path(f"{directory}/latest.new").write_text(name + "\n")
    Path(f"{directory}/latest.new").replace(f"{directory}/latest")


def load_learner(directory, target):
    """-> the latest draft that --save kept there, or that of one version's directory; what Learner.restore takes."""
    directory = directory.resolve()
    if not (directory / "draft.pt").is_file():
        if not (directory / "latest").is_file():
            raise UserError(f"{directory} holds no `latest`: expected a directory that --save wrote")
        directory = directory / (directory / "latest").read_text(errors="replace").strip()
    draft, record = load_draft(directory / "draft.pt", target)
    beside = directory.with_name(f"{directory.name}.learner.pt")
    if not beside.is_file():
        return draft, {"version": record.get("version", 0)}
    try:
        return draft, torch.load(beside, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{beside} cannot be read ({type(error).__name__})") from None
