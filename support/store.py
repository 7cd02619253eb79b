"""Files: checkpoints of this project, and the versions that --save keeps of a learning draft.

A checkpoint is one file, {"config", "weights", "record"}, read without pickle.  A --save directory
holds v000012/draft.pt, the learner's state beside it, and `latest`, which names a whole version;
lineage.jsonl tells where each came from.  All of it is for the owner's eyes alone.
"""

import fcntl
import os
import re
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from model import Config, Transformer, UserError
from support import lineage


def write(path, content):
    """content: text, or what torch.save takes.  It is written under a name that nobody shares,
    flushed to the disk and renamed, so that what stands at `path` is always whole.  OSError if it
    cannot be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(handle, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        os.unlink(new)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        reason = getattr(error, "strerror", None) or "is the disk full?"  # torch does not say
        raise OSError(f"cannot write {path}: {reason}") from None


def save(path, config, weights, record):
    write(path, {"config": asdict(config), "weights": weights, "record": record})


def load(path):
    """-> config (Config), weights (name -> tensor), record (dict of plain values)."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: expected a file of pretrain.py or --save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config, weights = Config(**content["config"]), dict(content["weights"])
        check(config, weights)
        return config, weights, dict(content["record"])
    except Exception as error:  # torch raises many kinds for a file that is not its own
        what = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{path} is not a checkpoint of this project ({what})") from None


def check(config, weights):
    """Raises UserError for what no model has; other errors mean values of a wrong kind."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and not (type(value) is int and 1 <= value <= 2**24):
            raise UserError(f"{field.name} is {value!r:.40}")
        if field.type is float and not (type(value) in (int, float) and 0 < value < 1e15):
            raise UserError(f"{field.name} is {value!r:.40}")
    V, largest = config.vocab_size, max(config.vocab_size, config.intermediate_size)
    ids = [*config.suppress_tokens, *config.eos_token_ids]
    ids += [] if config.bos_token_id is None else [config.bos_token_id]
    if not all(type(i) is int and 0 <= i < V for i in ids) or len(set(config.suppress_tokens)) == V:
        raise UserError(f"its special tokens are not all in 0..{V - 1}, or all are suppressed")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError("its heads do not divide into groups, or their width into halves")
    if largest * config.hidden_size > 2**34 or config.max_position_embeddings > 2**22:
        raise UserError("its sizes are beyond any model's")
    for name, tensor in weights.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or not (tensor.is_floating_point() or name == "vocabulary"):
            raise UserError(f"{printable(name)} is no plain tensor of floats")


def fill(model, weights, path, assign=False):
    """Copies weights into the model, or makes them its own.  Every tensor is used, every parameter
    filled, every shape right and every number finite, or it is a UserError."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        what = "missing" if name in own else "not known to this model"
        raise UserError(f"{path}: tensor {printable(name)} is {what}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            raise UserError(f"{path}: {printable(name)} has shape {shapes}")
        if not finite(tensor):
            raise UserError(f"{path}: {printable(name)} holds NaN or infinity")
    model.load_state_dict(weights, assign=assign)
    return model


def finite(tensor):
    return not tensor.numel() or all(x.isfinite() for x in tensor.aminmax())


def printable(name):
    """A name out of a file, as it may stand in one line."""
    return ascii(name)[1:-1]


def load_target(path):
    config, weights, record = load(path)
    if config.num_hidden_layers < 2:
        raise UserError(f"{path} is a draft, not a target: it has {config.num_hidden_layers} layer")
    return fill(Transformer(config), weights, path), record


# ---- versions ------------------------------------------------------------------------------------


class Store:
    """A --save directory, held by one process at a time.

    `latest` changes last, so what it names is whole.  Numbers go on from the highest that was ever
    given: to go on from an older version overwrites none."""

    def __init__(self, directory, new=True):
        """new: it may be one that is not there yet."""
        self.directory = Path(directory)
        if not new and not self.directory.is_dir():
            raise UserError(f"no directory {directory}: expected one of --save")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.directory / ".lock", "w", opener=lineage.private)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is saving into {directory}") from None
        except OSError as error:
            raise UserError(f"cannot save in {directory}: {error.strerror}") from None
        given = [number_of(path) for path in self.directory.glob("v*")]
        given += [line["version"] for line in lineage.read(self.directory) if line["version"]]
        self.first = 1 + max(given, default=-1)
        self.written = 0  # bytes of versions

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lock.close()

    def write(self, version, draft, state):
        """state: the learner's, None if there is none.  -> the number that it was kept under, and
        the OSError that kept its state from the disk, None if nothing did."""
        number = max(version, self.first)
        return number, self.keep(number, draft.config, draft.state_dict(), {"version": version},
                                 state)

    def keep(self, number, config, weights, record, state):
        """-> the OSError that kept the learner's state from the disk, or None.  OSError if the
        draft cannot be written either; then the number is nobody's."""
        name, trouble = f"v{number:06d}", None
        try:
            if state is not None:
                write(self.directory / name / "learner.pt", state)
        except OSError as error:  # there may be room for the draft yet
            trouble = error
        save(self.directory / name / "draft.pt", config, weights, record)
        write(self.directory / "latest", name + "\n")
        self.written += sum(path.stat().st_size for path in (self.directory / name).iterdir())
        return trouble

    def roll_back(self, number):
        """A version that was kept is the latest again, under a new number; nothing is lost."""
        folder = self.directory / f"v{number:06d}"
        if not (folder / "draft.pt").is_file():
            kept = sorted(number_of(path.parent) for path in self.directory.glob("v*/draft.pt"))
            raise UserError(f"{self.directory} keeps no version {number}: expected one of "
                            f"{', '.join(map(str, kept)) or 'none'}")
        path, state = load_version(folder)
        config, weights, record = load(path)
        if state is not None:
            state["version"] = self.first
        latest = self.directory / "latest"
        before = number_of(Path(latest.read_text().strip())) if latest.is_file() else None
        record["version"] = self.first
        trouble = self.keep(self.first, config, weights, record, state)
        lineage.append(self.directory, "rolled back", self.first, number, instead_of=before,
                       sha256=lineage.hash_of_weights(weights), lost=trouble and str(trouble))
        if trouble:
            raise trouble
        return f"version {number} is the latest again, as version {self.first}"


def number_of(path):
    return int(path.name[1:]) if re.fullmatch(r"v[0-9]{1,9}", path.name) else -1


def load_version(directory):
    """The latest version in a --save directory, or one version's own directory -> the path of its
    draft, and the learner's state, None if there is none."""
    directory = directory.resolve()
    if not (directory / "draft.pt").is_file():
        if not (directory / "latest").is_file():
            raise UserError(f"{directory} holds no `latest`: expected a directory of --save")
        name = (directory / "latest").read_text(errors="replace").strip()
        if number_of(Path(name)) < 0:
            raise UserError(f"{directory}/latest names no version: {printable(name)[:40]}")
        directory = directory / name
    beside = directory / "learner.pt"
    if not beside.is_file():
        return directory / "draft.pt", None
    try:
        state = torch.load(beside, map_location="cpu", weights_only=True)
        int(state["version"])
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{beside} cannot be read ({type(error).__name__})") from None
    return directory / "draft.pt", state
