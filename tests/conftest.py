"""Fixtures that several files share."""

import json

import pytest

from support.build import kernel
from support.store import save

from .serving import BYTES, keep
from .tiny import tiny_target


@pytest.fixture(scope="session")
def fused():
    """The operator for the CPU: (target, draft, tokens, coins, temperature, block) -> kept, next
    token, status."""
    if not kernel("cpu"):
        pytest.skip("no kernel here: no compiler, no ninja, or AURORA_KERNEL=torch")
    return kernel("cpu")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A tiny byte-level target, prompts of two classes, and more of them than anyone waits for."""
    folder = tmp_path_factory.mktemp("driver")
    target = tiny_target(gain=2.0, **BYTES)
    save(folder / "target.pt", target.config, target.state_dict(), {})
    prompts = [{"prompt": f"prompt {i}", "class": "ab"[i // 2]} for i in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "many.txt").write_text("one prompt of many\n" * 5000)
    return folder


@pytest.fixture(scope="session")
def kept(files, tmp_path_factory):
    """One run that compares, learns and saves; --no-gate makes every answer a version."""
    folder = tmp_path_factory.mktemp("kept")
    keep(files, folder, "--draft", "scratch")
    return folder
