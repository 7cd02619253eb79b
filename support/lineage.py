"""Lineage: where every version came from.  A line an event in DIR/lineage.jsonl, as it happens.

    began        a run did, with what serves first
    learned      what was learned serves from here on, or serves better learned
    set aside    it is no longer ahead: what the run began with serves again
    dropped      it is clearly behind: it is gone, and learning pauses
    slower       the last 8 answers made fewer tokens a second than plain decoding, however many of
                 them were accepted; `faster` says when they make more again
    stopped      learning did, `reason` says why; serving went on
    kept         what served last is on the disk under this number; `lost` says why the learner's
                 state is not, if it is not
    rolled back  an older version is the latest again, as a new one

A line tells version, parent and time of each; of what was learned, all that led to it: the requests
since the line before (number in the run, class, a hash of the prompt's ids, tokens a round to
expect of what the run began with and of what was learned by then, both before this answer taught
anything), steps, loss, gradient norm, the gate's mean and z, speed beside plain decoding.
"""

import hashlib
import json
import os
import sys
import time
from array import array
from pathlib import Path

import torch

NAME = "lineage.jsonl"
ANSWERS, CLEARLY = 8, 0.05  # behind plain decoding, or ahead of it, by such a share


def private(path, flags):
    """Opens for the owner's eyes alone, as `opener` of open()."""
    return os.open(path, flags, 0o600)


def hash_of_weights(weights):
    """sha256 of names and bytes, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of_ids(ids):
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def append(directory, event, version, parent, **more):
    """One line, on its way to the disk when this returns -> its bytes.  OSError if it cannot be."""
    line = {"event": event, "version": version, "parent": parent, "time": time.time()} | more
    with open(Path(directory, NAME), "ab+", opener=private) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the line before was cut short
                file.write(b"\n")
        return file.write(json.dumps(line).encode() + b"\n")


def read(directory):
    """-> the lines, oldest first.  One that a crash or a full disk cut short is left out."""
    lines, path = [], Path(directory, NAME)
    for text in path.read_text(errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= {"event", "version", "parent", "time"}:
            lines.append(line)
    return lines


class Lineage:
    """Of one run.  What it cannot write it says once, and serving goes on."""

    def __init__(self, directory, args, draft, version):
        self.directory, self.version = directory, version  # of what serves; None: it has none yet
        self.rule, self.estimator = args.rule, args.estimator
        self.number, self.request = -1, None  # the last one that was served
        self.broken = self.stopped = self.slow = False
        self.written = 0  # bytes
        self.clear()
        weights = hash_of_weights(draft.state_dict())
        self.write("began", version, draft=args.draft, sha256=weights)

    def clear(self):
        self.requests, self.steps, self.seconds = [], 0, 0.0
        self.loss = self.norm = None  # of the last answer that was learned from

    def serve(self, served, speeds, trouble):
        """One more answer; what the learner made of the one before; why it stopped, if it has."""
        self.learn(served.outcome, speeds, trouble)
        self.number, self.request = self.number + 1, served.request
        self.watch(speeds)

    def watch(self, speeds):
        """Acceptance is not all: what it costs may be more than it brings."""
        plain = speeds["plain_tokens_per_second"]
        if plain is None or self.number + 1 < ANSWERS:
            return
        ratio = speeds["tokens_per_second"] / plain
        slow = ratio < 1 + CLEARLY if self.slow else ratio < 1 - CLEARLY
        if slow != self.slow:
            self.slow = slow
            self.write("slower" if slow else "faster", self.version, **speeds)

    def learn(self, outcome, speeds, trouble):
        if outcome:
            self.fed(outcome)
            if outcome.weights or outcome.dropped:
                self.change(outcome, speeds)
        if trouble and not self.stopped:
            self.stopped = True
            self.write("stopped", self.version, reason=trouble)

    def fed(self, outcome):
        self.requests.append({
            "number": self.number, "class": self.request.kind,
            "sha256": hash_of_ids(self.request.prompt),
            "began": outcome.began, "learned": outcome.learned})
        self.steps, self.seconds = self.steps + outcome.steps, self.seconds + outcome.seconds
        if outcome.steps:
            self.loss, self.norm = outcome.loss, outcome.norm

    def change(self, outcome, speeds):
        event = "learned" if outcome.serves == "learned" else "set aside"
        weights = hash_of_weights(outcome.weights) if outcome.weights else None
        parent, self.version = self.version, outcome.version
        self.write("dropped" if outcome.dropped else event, parent, sha256=weights,
                   **self.told(), gate_mean=outcome.mean, gate_z=outcome.z, **speeds)

    def told(self):
        """What the learner did since the last line that told it."""
        told = {"rule": self.rule, "estimator": self.estimator, "requests": self.requests,
                "expected_length": by_class(self.requests), "steps": self.steps,
                "loss": self.loss, "gradient_norm": self.norm, "learn_seconds": self.seconds}
        self.clear()
        return told

    def keep(self, number, draft, costs, lost):
        """The run is over, and what served last is on the disk.  lost: the error that kept the
        learner's state from it, or None."""
        parent, self.version = self.version, number
        weights = hash_of_weights(draft.state_dict())
        self.write("kept", parent, sha256=weights, **self.told(), costs=costs,
                   lost=lost and str(lost))

    def write(self, event, parent, **more):
        if self.broken:
            return
        try:
            self.written += append(self.directory, event, self.version, parent, **more)
        except OSError as error:
            self.broken = True
            print(f"\naurora: the lineage ends here, serving goes on: cannot write "
                  f"{self.directory}/{NAME}: {error.strerror}", file=sys.stderr)


def by_class(requests):
    """-> {class: tokens a round to expect, [began, learned], in the mean}"""
    kinds = {}
    for r in requests:
        kinds.setdefault(r["class"], []).append((r["began"], r["learned"]))
    return {kind: [sum(x) / len(x) for x in zip(*pairs)] for kind, pairs in kinds.items()}
