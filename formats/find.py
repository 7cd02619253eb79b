"""What the command line's names mean: a file of this project, a directory, a name on the hub."""

import re
from pathlib import Path

import torch

from draft import Draft, load_draft
from formats import huggingface, small_model
from formats.gguf import is_gguf
from formats.pruned import common_ids
from formats.tokens import Bytes
from model import UserError
from support.options import STATIC
from support.store import load_target, load_version


def find_target(name, dtype):
    """-> the target, on the CPU, and its tokenizer.  dtype: of a directory's weights, "auto" is as
    they are there; support/precision.py decides for good."""
    gguf = next((path for path in (Path(name), *Path(name).glob("*.gguf")) if is_gguf(path)), None)
    if gguf and not Path(name, "config.json").exists():
        raise UserError(f"{gguf} is a GGUF: python -m formats.gguf {gguf} --out DIR makes a "
                        "directory of it that --target takes")
    if not is_file(name):
        return huggingface.load_target(name, None if dtype == "auto" else getattr(torch, dtype))
    target = load_target(name)[0]
    return target, Bytes(target.config)


def find_draft(name, target, size=0):
    """-> a draft for the target, None if there is none; and the state of the learner that was kept
    with it, None if none was.  size: how many ids a fresh one can say, 0 is all."""
    if name == "none":
        return None, None
    if name == "scratch":
        return Draft(target, vocabulary=common_ids(target.config, size) if size else None), None
    name, state = STATIC.get(name, name), None
    if Path(name).is_dir() and not Path(name, "config.json").exists():
        name, state = load_version(Path(name))
    if not is_file(str(name)):
        return huggingface.load_draft(name, target), None
    if Path(name).is_file() and small_model.is_small_model(name):
        return small_model.load_small_model(name, target), state
    return load_draft(name, target)[0], state


def is_file(name):
    """A file that this project wrote, or that is missing; all else is a directory or a hub's."""
    looks_like = name.endswith(".pt") or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    return Path(name).is_file() or not Path(name).is_dir() and looks_like
