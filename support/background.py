"""The learner on another core: `submit` hands it an answer, `result` waits for what it made of it.

On a CPU it is a process, as two threads of one interpreter hold each other up; on a GPU a thread.
A learner that fails, hangs, dies or hands over what is no weights never ends the serving: it is
said once, and serving goes on without it.
"""

import importlib
import io
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from multiprocessing import connection, get_context, parent_process

import torch

from model import UserError
from support.command import complain, deaf
from support.costs import megabytes_held
from support.store import finite

DIED = "the learner's process died; is there memory for it?"
LIMIT = 120.0  # seconds that serving waits for one answer's learning


class Background:
    """learner: an object with update(trace) and state().  In a process it is a copy that learns.

    trouble: why it learns no more, None as long as it does.  A process that hangs is killed; a
    thread cannot be, so the program then ends only when it does."""

    def __init__(self, learner, process, limit=LIMIT):
        self.learner, self.process, self.limit = learner, process, limit
        self.pending, self.trouble, self.lost = None, None, False
        if process:
            context, start = get_context("spawn"), (packed(learner), torch.get_num_threads())
            with deaf(signal.SIG_IGN):  # for the processes too, from their first moment
                self.core = ProcessPoolExecutor(1, context, initializer=begin, initargs=start)
                started = self.core.submit(os.getpid)
            try:
                self.pid = started.result()  # its start is nobody's waiting
            except BrokenExecutor:
                raise UserError(f"{DIED}  --no-learn serves without it") from None
        else:
            self.core = ThreadPoolExecutor(1)

    def submit(self, trace):
        if self.trouble:
            return
        if self.process:
            self.pending = self.ask(update_there, packed(trace))
        else:
            self.pending = self.ask(self.learner.update, trace)

    def result(self):
        """-> what the learner made of the answer that it was given last; None if there is none, or
        if it failed."""
        pending, self.pending = self.pending, None
        outcome = self.wait(pending)
        if outcome and outcome.weights and not all(finite(w) for w in outcome.weights.values()):
            return self.give_up("what it learned holds NaN or infinity")
        return outcome

    def close(self):
        """-> the learner's state; None if it is lost."""
        state = None
        if not self.lost:
            state = self.wait(self.ask(state_there if self.process else self.learner.state))
        self.core.shutdown(wait=self.process or not self.lost)
        return state

    def ask(self, call, *given):
        try:
            return self.core.submit(call, *given)
        except BrokenExecutor:
            return self.give_up(DIED)

    def wait(self, pending):
        """-> what a call gave; None if it gave nothing."""
        if pending is None:
            return None
        try:
            given = pending.result(self.limit)
            return unpacked(given) if self.process else given
        except BrokenExecutor:
            return self.give_up(DIED)
        except TookTooLong:
            if self.process:
                os.kill(self.pid, signal.SIGKILL)
            return self.give_up(f"an answer took it more than {self.limit:g} seconds")
        except UserError as error:  # it has put itself in order
            return self.give_up(str(error), lost=False)
        except Exception as error:
            return self.give_up(f"{type(error).__name__}: {error}")

    def give_up(self, trouble, lost=True):
        """lost: nobody knows what state it is in."""
        self.lost = self.lost or lost
        if not self.trouble:
            self.trouble = trouble
            complain(f"\naurora: serving goes on without learning: {trouble}")


def packed(x):
    """Between our own processes only; what is read from files goes through weights_only."""
    data = io.BytesIO()
    torch.save(x, data)
    return data.getvalue()


def unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def begin(learner, threads):
    """Where the process begins; it ends with the one that serves."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # numbers under 1e-38 take a processor far longer
    importlib.import_module("torch._dynamo")  # the first step would, and serving wait a second
    global learner_here
    learner_here = unpacked(learner)


def end_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)


def update_there(trace):
    outcome = learner_here.update(unpacked(trace))
    outcome.held = megabytes_held()
    return packed(outcome)


def state_there():
    return packed(learner_here.state())
