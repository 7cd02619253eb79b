"""Files: checkpoints of this project, and the versions that --save keeps of a learning draft.

A checkpoint is one file, {"config", "weights", "record"}, read without pickle.  A --save directory
holds v000012/draft.pt, the learner's state beside it, and `latest`, which names a whole version;
lineage.jsonl tells where each came from.  All of it is for the owner's eyes alone.
"""

import fcntl
import os
import tempfile
from dataclasses import asdict
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
        return Config(**content["config"]), dict(content["weights"]), dict(content["record"])
    except Exception as error:  # torch raises many kinds for a file that is not its own
        kind = type(error).__name__
        raise UserError(f"{path} is not a checkpoint of this project ({kind})") from None


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
        """state: the learner's, None if there is none.  -> the number that it was kept under."""
        return self.keep(max(version, self.first), draft.config, draft.state_dict(),
                         {"version": version}, state)

    def keep(self, number, config, weights, record, state):
        name = f"v{number:06d}"
        if state is not None:
            write(self.directory / name / "learner.pt", state)
        save(self.directory / name / "draft.pt", config, weights, record)
        write(self.directory / "latest", name + "\n")
        self.written += sum(path.stat().st_size for path in (self.directory / name).iterdir())
        return number

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
        self.keep(self.first, config, weights, record | {"version": self.first}, state)
        lineage.append(self.directory, "rolled back", self.first, number, instead_of=before,
                       sha256=lineage.hash_of_weights(weights))
        return f"version {number} is the latest again, as version {self.first}"


def number_of(path):
    return int(path.name[1:]) if path.name[1:].isdigit() else -1


def load_version(directory):
    """The latest version in a --save directory, or one version's own directory -> the path of its
    draft, and the learner's state, None if there is none."""
    directory = directory.resolve()
    if not (directory / "draft.pt").is_file():
        if not (directory / "latest").is_file():
            raise UserError(f"{directory} holds no `latest`: expected a directory of --save")
        directory = directory / (directory / "latest").read_text(errors="replace").strip()
    beside = directory / "learner.pt"
    if not beside.is_file():
        return directory / "draft.pt", None
    try:
        state = torch.load(beside, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{beside} cannot be read ({type(error).__name__})") from None
    return directory / "draft.pt", state
