"""The text that every machine with Python and torch has: what the shipped weights were trained on,
and the prompts that are served where no others are given.

`python` is the standard library's source, `cpp` the C++ headers under torch's include folder, and
`docs` prose: pydoc's topics and the long docstrings of the standard library, numpy and torch.
crc32(name) % 10 decides where a file goes: 0 is traffic, which is served, 1 is the evaluation set,
the rest is trained on.  A docstring goes where its file goes, and one that is in `docs` is cut out
of `python`.
"""

import ast
import inspect
import os
import platform
import random
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import torch

from model import UserError

CLASSES = ("python", "cpp", "docs")
BOS = 256  # the begin token; text is bytes
SPLITS = ("eval", "traffic", "train")
LONG_DOCSTRING = 300  # characters; shorter ones stay in the source
LONG_LINE = 60  # characters; a shorter line may well be written twice
SHARED = 64  # characters in a row that no two prompts have in common
ROOTS = {
    "python": Path(sysconfig.get_paths()["stdlib"]),
    "numpy": Path(np.__file__).parent,
    "torch": Path(torch.__file__).parent,
}


# ---- files ---------------------------------------------------------------------------------------


def split_of(name):
    return {0: "traffic", 1: "eval"}.get(zlib.crc32(name.encode()) % 10, "train")


def adds_a_docstring(node):
    """Whether it is a call of add_newdoc, add_docstr and the like, as in numpy and torch."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    return "add" in name and "doc" in name


def strings_beside(node):
    """What may be a docstring: the first statement of a body, or all that such a call is given."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if node.body and isinstance(node.body[0], ast.Expr):
            yield node.body[0].value
    elif adds_a_docstring(node):
        for argument in node.args:
            yield from ast.walk(argument)


def long_docstrings(source):
    """Their nodes.  Raises SyntaxError, and ValueError for a null byte."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for string in strings_beside(node):
            text = getattr(string, "value", None)
            if isinstance(text, str) and len(text) >= LONG_DOCSTRING:
                found.append(string)
    return found


def without_lines_of(source, nodes):
    lines = source.split("\n")  # as ast counts them: splitlines would split at form feeds too
    for node in nodes:
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None) + "\n"


def python_files(root):
    """Sorted; no tests, and nothing that was installed."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if "test" not in name and name != "site-packages"]
        found += [Path(folder, f) for f in files if f.endswith(".py") and "test" not in f]
    return sorted(found)


def topics(splits):
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        if split_of(f"pydoc/{topic}") in splits:
            yield "docs", f"pydoc/{topic}", text.strip() + "\n"


def sources(package, splits, classes):
    for path in python_files(ROOTS[package]):
        parts = path.relative_to(ROOTS[package]).parts
        name = "/".join((package, *parts))
        if parts[0] in ("pydoc_data", "include") or split_of(name) not in splits:
            continue
        try:
            source = path.read_text()
            nodes = long_docstrings(source)
        except (SyntaxError, ValueError):  # a template, or not UTF-8
            continue
        if nodes and "docs" in classes:
            prose = [inspect.cleandoc(node.value).strip() + "\n" for node in nodes]
            yield "docs", name, "\n".join(prose)
        if package == "python" and "python" in classes:
            yield "python", name, without_lines_of(source, nodes)


def headers(splits):
    include = ROOTS["torch"] / "include"
    for path in sorted(include.rglob("*")):
        name = "include/" + path.relative_to(include).as_posix()
        code = path.suffix in (".h", ".hpp", ".cuh") and "test" not in name
        if code and split_of(name) in splits:
            yield "cpp", name, path.read_text(errors="ignore")


def documents(splits, classes=CLASSES):
    """Yields (class, name, text) for every document of these splits and classes, before repeats are
    removed.  No other is read."""
    if "docs" in classes:
        yield from topics(splits)
    for package in ROOTS:
        if "docs" in classes or package in classes:
            yield from sources(package, splits, classes)
    if "cpp" in classes:
        yield from headers(splits)


def texts_of(kind, split):
    return [text for _, _, text in documents((split,), (kind,))]


# ---- the corpus ----------------------------------------------------------------------------------


def without_repeats(text, seen, window=3):
    """Drops every run of `window` or more lines that `seen` holds already (blank lines do not
    count), and every long line that it holds; then adds this text's own runs and lines."""
    lines = text.split("\n")
    full = [(i, line.strip()) for i, line in enumerate(lines) if line.strip()]
    drop, new = set(), set()
    for j, (i, line) in enumerate(full):
        run = full[j : j + window]
        if len(run) == window:
            key = hash("\n".join(line for _, line in run))
            new.add(key)
            if key in seen:
                drop.update(range(i, run[-1][0] + 1))
        if len(line) >= LONG_LINE:
            new.add(hash(line))
            if hash(line) in seen:
                drop.add(i)
    seen |= new
    return "\n".join(line for i, line in enumerate(lines) if i not in drop).strip("\n") + "\n"


def corpus(classes=CLASSES):
    """{class: {split: [(name, text)]}}.  The evaluation set is read first, then the traffic: what
    repeats is removed from the later one, so held-out text is whole and training text has none of
    it."""
    out, seen = {kind: {} for kind in classes}, set()
    for split in SPLITS:
        for kind in classes:
            out[kind][split] = []
        for kind, name, text in documents((split,), classes):
            text = without_repeats(text, seen)
            if len(text) >= 200:
                out[kind][split].append((name, text))
    return out


def as_bytes(documents):
    text = "\n".join(text for _, text in documents)
    return np.frombuffer(text.encode(errors="ignore"), dtype=np.uint8)


def record(texts, **more):
    """What weights were made of; stands in their checkpoint."""
    sizes = {}
    for kind, splits in texts.items():
        for split, documents in splits.items():
            sizes[f"{kind} {split}"] = sum(len(text) for _, text in documents)
    made_of = (
        "Python standard library (PSF licence); C++ headers under torch/include (BSD-3-Clause; "
        "parts Apache-2.0, MIT, BSL-1.0); docstrings of the standard library, numpy and torch "
        "(PSF, BSD-3-Clause)"
    )
    split = "crc32(name) % 10: 0 traffic, 1 evaluation, the rest training"
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions["torch"] = str(torch.__version__)
    return {"corpus": made_of, "characters": sizes, "split": split} | versions | more


def lines_of(documents):
    return [line.strip() for _, text in documents for line in text.split("\n")]


def print_corpus(texts):
    for kind, splits in texts.items():
        print(f"{kind:7s}", end="")
        for split, documents in splits.items():
            size = sum(len(text) for _, text in documents)
            print(f" {split} {len(documents):5d} files {size / 1e6:6.2f} MB |", end="")
        train = set(lines_of(splits["train"]))
        held_out = [line for line in lines_of(splits["eval"]) if len(line) >= 40]
        both = sum(line in train for line in held_out) / max(1, len(held_out))
        print(f" held-out lines of 40+ characters also in train: {both:.1%}")


# ---- batches -------------------------------------------------------------------------------------


def sample(streams, batch, length, rng):
    """(batch, length + 1) int64: BOS, then bytes from a random place of each stream in turn."""
    ids = np.full((batch, length + 1), BOS, dtype=np.int64)
    for row in range(batch):
        stream = streams[row % len(streams)]
        start = rng.integers(len(stream) - length)
        ids[row, 1:] = stream[start : start + length]
    return torch.from_numpy(ids)


def windows(stream, count, length):
    """(count, length + 1) int64: BOS, then bytes from evenly spaced places, first to last."""
    ids = np.full((count, length + 1), BOS, dtype=np.int64)
    for row, start in enumerate(np.linspace(0, len(stream) - length, count).astype(int)):
        ids[row, 1:] = stream[start : start + length]
    return torch.from_numpy(ids)


# ---- prompts -------------------------------------------------------------------------------------


def line_starts(text, length):
    """Where a line begins that is not blank and is followed by `length` characters in all."""
    starts, start = [], 0
    while start + length <= len(text):
        if text[start] != "\n":
            starts.append(start)
        start = text.find("\n", start) + 1 or len(text)
    return starts


def prompts_of(kind, split, count, seed, length=128):
    """`count` stretches of `length` characters that start at a line, from files of this split.

    No two share SHARED characters in a row: a memory of what was said would be praised for the
    boilerplate of generated headers.  They depend on the class and the seed alone, and fewer are
    the first of more.  Raises UserError for an unknown class and where text is too scarce."""
    if kind not in CLASSES:
        raise UserError(f"unknown class of text {kind!r}: expected some of {','.join(CLASSES)}")
    texts, places = texts_of(kind, split), []
    for i, text in enumerate(texts):
        places += [(i, start) for start in line_starts(text, length)]
    random.Random(f"{kind} {seed}").shuffle(places)
    prompts, seen = [], set()
    for i, start in places:
        if len(prompts) == count:
            break
        prompt = texts[i][start : start + length]
        windows = {prompt[j : j + SHARED] for j in range(max(1, length - SHARED + 1))}
        if seen.isdisjoint(windows):
            seen |= windows
            prompts.append(prompt)
    if len(prompts) < count:
        raise UserError(
            f"the {split} text of class {kind} on this machine holds {len(prompts)} prompts of "
            f"{length} characters that do not repeat each other, not {count}: ask for fewer or for "
            f"other classes, or give prompts of your own"
        )
    return prompts
