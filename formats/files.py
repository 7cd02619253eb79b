"""Directories in Hugging Face layout: found, read and written, without a word on what is in them.

Weights are safetensors, memory-mapped.  No pickle is read and no code of a checkpoint is run.  The
extras of requirements-hf.txt are imported here, by `need`, and only when something needs them.
"""

import errno
import importlib
import json
import tempfile
from pathlib import Path

from model import UserError


def need(module, what="this checkpoint", where="requirements-hf.txt"):
    """An optional extra, or one line that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"{what} needs {package}: pip install -r {where}") from None


def locate(name):
    """A directory as it is; any other name is fetched from the hub, or found in its cache."""
    if Path(name).is_dir():
        return Path(name)
    missing = f"{name} is no directory here"
    hub = need("huggingface_hub", f"{missing}, and fetching it from the hub")
    kinds = {"allow_patterns": ["*.safetensors", "*.json"], "ignore_patterns": ["*/*"]}
    try:
        return Path(hub.snapshot_download(str(name), **kinds))
    except Exception as error:  # a dozen kinds: offline, no such name, no permission
        reason = (str(error).strip().splitlines() or [""])[0]
        kind = type(error).__name__
        raise UserError(f"{missing} and could not be fetched ({kind}: {reason})") from None


def read_json(path):
    """-> dict"""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object")
    return content


def shards(directory):
    """The names of the files that hold the weights."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: expected a weight_map from tensors to files")
    for name in where.values():
        plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            where = shorten(name)
            raise UserError(f"{index}: weight_map leads to {where}, not to a file beside it")
    return sorted(set(where.values()))


def read_tensors(directory):
    """-> {name: tensor}, views of the mapped files: nothing is read before it is used."""
    tensors, safe_open = {}, need("safetensors").safe_open
    for name in shards(directory):
        path = directory / name
        if not path.is_file():
            pickles = any(directory.glob("*.bin"))
            hint = " (pickles are never read: convert them to safetensors)" if pickles else ""
            raise UserError(f"{directory}: no {name}{hint}")
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:  # a truncated or foreign file
            kind = type(error).__name__
            raise UserError(f"{path} is not a whole safetensors file ({kind})") from None
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise UserError(f"{directory}: tensor {shorten(twice[0])} stands in two files")
        tensors |= found
    tables = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    for name in tables:  # old files keep what follows from the configuration
        del tensors[name]
    return tensors


def write(directory, tensors, **files):
    """A directory that is either whole or not there: model.safetensors and {name}.json.  Raises
    OSError if it cannot be written."""
    directory = Path(directory)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file = need("safetensors.torch", "writing a checkpoint").save_file
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder:
        new = Path(folder) / directory.name
        new.mkdir()  # as others may read it: engines run as somebody else
        try:
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        except Exception as error:  # safetensors has a kind of its own for a full disk
            raise OSError(errno.EIO, f"is the disk full? ({error})") from None
        for name, content in files.items():
            file = new / f"{name}.json"
            file.write_text(json.dumps(content, indent=2) + "\n")
            (new / "model.safetensors").chmod(file.stat().st_mode)
        new.rename(directory)


def shorten(value):
    """A value that somebody else wrote, for a message: on one line, and not all of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
