"""Runs of the command line, small enough for tests."""

import json
from pathlib import Path

import aurora


HERE = Path(aurora.__file__).parent
BYTES = dict(
    vocab_size=257, bos_token_id=256, suppress_tokens=(256,), max_position_embeddings=512
)
ARMS = ("plain", "static", "online")


def flags(files, *more, prompts="prompts.jsonl"):
    given = ["--target", f"{files}/target.pt", "--max-new-tokens", "12", "--learn-every", "12"]
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
