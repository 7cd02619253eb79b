"""Runs of the command line, small enough for tests."""

import json
import subprocess
import sys
import time
from pathlib import Path

import aurora

HERE = Path(aurora.__file__).parent
BYTES = dict(
    vocab_size=257, bos_token_id=256, suppress_tokens=(256,), max_position_embeddings=512
)
ARMS = ("plain", "static", "online")


def flags(files, *more, prompts="prompts.jsonl"):
    given = ["--target", f"{files}/target.pt", "--max-new-tokens", "12", "--learn-every", "12",
             "--dtype", "float32"]
    if "--prompt" not in more and "--prompts" not in more:
        given += ["--prompts", f"{files}/{prompts}"]
    if "--num-speculative-tokens" not in more:
        given += ["--num-speculative-tokens", "3"]
    return [*given, *map(str, more)]


def serve(files, *more):
    aurora.main(flags(files, *more))


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_clock(x):
    """A line of the log, but for what a clock measured."""
    if not isinstance(x, dict):
        return x
    return {key: without_clock(value) for key, value in x.items() if "seconds" not in key}


def keep(files, folder, *more):
    serve(files, "--compare", "--no-gate", "--save", folder / "draft", *more,
          "--report", folder / "r.json", "--log", folder / "l.jsonl")


class Running:
    """aurora.py as a process that serves on and on, learning, once it has served a few requests."""

    def __init__(self, files, folder, stderr=subprocess.PIPE):
        self.log, self.kept = folder / "l.jsonl", folder / "kept"
        more = flags(files, "--save", self.kept, "--log", self.log, "--no-gate", prompts="many.txt")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "aurora.py", *more], text=True, stdout=subprocess.PIPE,
            stderr=stderr)
        wait_for(lambda: self.log.exists() and len(self.log.read_text().splitlines()) >= 8)

    def learner(self):
        """The process ids of the learner: what the main process has spawned."""
        found = []
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children"
                          ).read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
