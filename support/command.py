"""A program's beginning and end: signals that ask it to end, streams, exit codes."""

import os
import signal
import sys
from contextlib import contextmanager

from model import UserError

ENDINGS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # what asks a program to end


def command(main, name, errors=()):
    """Runs main() as a program.  What the user gave and cannot be used, and a full disk or the
    like, is one line and exit code 2; errors: more kinds of such.  Interrupted, the code is 130."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started this
            setattr(sys, stream, open(os.devnull, "w"))
    for ending in ENDINGS:
        signal.signal(ending, stop)
    code = 0
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (UserError, OSError, MemoryError, *errors) as error:
        complain(f"{name}: {error or 'out of memory'}")
        code = 2
    except KeyboardInterrupt:
        code = 130
    for ending in ENDINGS:
        signal.signal(ending, unheard)
    sys.exit(code)


def complain(text):
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody can be told
        pass


def stop(*_):
    """The first signal ends what is going on; from then on none is heard, so that all is kept."""
    for ending in ENDINGS:
        signal.signal(ending, unheard)
    raise KeyboardInterrupt


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
