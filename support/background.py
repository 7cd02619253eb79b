"""The learner on another core: `submit` hands it an answer, `result` waits for what it made of it.

On a CPU it is a process, as two threads of one interpreter hold each other up; on a GPU a thread.
"""

import importlib
import io
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process

import torch

from model import UserError

ENDINGS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # what asks a program to end
DIED = "the learner's process died; is there memory for it?  --no-learn serves without it"


class Background:
    """learner: an object with update(trace) and state().  In a process it is a copy that learns."""

    def __init__(self, learner, process):
        self.learner, self.process, self.pending = learner, process, None
        if process:
            context, start = get_context("spawn"), (packed(learner), torch.get_num_threads())
            self.core = ProcessPoolExecutor(1, context, initializer=begin, initargs=start)
            with deaf(signal.SIG_IGN):  # for the process too, from its first moment
                started = self.core.submit(os.getpid)
            try:
                started.result()  # its start is nobody's waiting
            except BrokenExecutor:
                raise UserError(DIED) from None
        else:
            self.core = ThreadPoolExecutor(1)

    def submit(self, trace):
        if self.process:
            self.pending = self.core.submit(update_there, packed(trace))
        else:
            self.pending = self.core.submit(self.learner.update, trace)

    def result(self):
        """-> what the learner made of the answer that it was given last, None if there is none."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        try:
            outcome = pending.result()
        except BrokenExecutor:
            raise UserError(DIED) from None
        return unpacked(outcome) if self.process else outcome

    def close(self):
        """-> the learner's state; None if its process has died."""
        with self.core:
            if not self.process:
                return self.learner.state()
            try:
                return unpacked(self.core.submit(state_there).result())
            except BrokenExecutor:
                return None


def packed(x):
    """Between our own processes only; what is read from files goes through weights_only."""
    data = io.BytesIO()
    torch.save(x, data)
    return data.getvalue()


def unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def unheard(*_):
    """Handles a signal by doing nothing.  (SIG_IGN makes Python complain of one on its way.)"""


@contextmanager
def deaf(handler=unheard):
    """No signal that asks to end is heard inside; with SIG_IGN, nor ever by a process that starts
    inside."""
    before = [signal.signal(name, handler) for name in ENDINGS]
    try:
        yield
    finally:
        for name, handler in zip(ENDINGS, before):
            signal.signal(name, handler)


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
    return packed(learner_here.update(unpacked(trace)))


def state_there():
    return packed(learner_here.state())
