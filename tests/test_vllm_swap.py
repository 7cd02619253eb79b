"""What goes into a vLLM that runs, as far as it can be tested without one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from formats import export, vllm_swap
from tests.test_formats import refused
from tests.tiny import tiny_draft, tiny_target

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

HOME = Path(__file__).parent.parent


@pytest.fixture
def head(tmp_path):
    """A head that serves, and the directory that it was exported to."""
    target = tiny_target()
    draft = tiny_draft(target)
    export.write_head(draft, tmp_path / "v000001", target)
    return draft, tmp_path / "v000001"


def read(draft, directory):
    sizes = json.loads((directory / "config.json").read_text())  # as the engine has them
    return vllm_swap.read_head(directory, SimpleNamespace(**sizes), draft.fc.weight.shape[1] // 3)


def test_it_is_imported_without_vllm():
    """An engine imports it by name, and the learner's machine may have no engine."""
    code = "import sys, formats.vllm_swap; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOME).returncode == 0


def test_an_exported_head_is_read_as_it_was_written(head):
    draft, directory = head
    tensors, written = read(draft, directory), load_file(directory / "model.safetensors")
    assert tensors.keys() == written.keys() and "embed_tokens.weight" not in tensors
    assert all(torch.equal(tensors[name], written[name]) for name in written)


WRONG = [
    ("fc.weight is .* expected", lambda t: t | {"fc.weight": t["fc.weight"][:, :-1].clone()}),
    ("does not fit", lambda t: t | {"lm_head.weight": t["lm_head.weight"].repeat(2, 1)}),
    ("does not fit", lambda t: t | {"lm_head.weight": t["lm_head.weight"][:, :-1].clone()}),
    ("lm_head.weight is missing", lambda t: {"weight": t["fc.weight"]}),
    ("NaN or infinity in norm.weight", lambda t: t | {"norm.weight": t["norm.weight"] / 0}),
]


@pytest.mark.parametrize("message, change", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_written(head, message, change):
    draft, directory = head
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)
    with refused(message):
        read(draft, directory)


def test_half_a_version_and_none_are_refused(head):
    draft, directory = head
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with refused("is no whole safetensors file"):
        read(draft, directory)
    path.unlink()
    with refused("is no whole safetensors file"):
        read(draft, directory)


def test_a_head_that_is_the_targets_is_not_written_into():
    """vLLM shares two lm_heads that are equal at load; the target's would take the new weights."""
    target, own = (SimpleNamespace(lm_head=torch.nn.Linear(4, 9)) for _ in range(2))
    vllm_swap.check_apart(own, target)
    for shared in (target.lm_head, SimpleNamespace(weight=target.lm_head.weight)):
        own.lm_head = shared
        with refused("lm_head is the target's own"):
            vllm_swap.check_apart(own, target)
