"""A learner beside an engine: what it learns, writes, refuses, and how it ends and goes on."""

import fcntl
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from formats import engine, huggingface
from learner import expected_length
from model import TargetHead
from support.store import save
from tests.test_formats import refused
from tests.test_hidden_states import BYTES, LAW, answered, leave
from tests.tiny import tiny_target

pytest.importorskip("safetensors")
from safetensors.torch import load_file  # noqa: E402

HOME = Path(__file__).parent.parent
FAST = "--learn-every", "24", "--lr", "0.05"
HELD_OUT = 1000  # a seed that no file is made from


@pytest.fixture(scope="module")
def target():
    """Its next token hangs mostly on the last one, which a few answers can teach."""
    target = tiny_target(gain=2.0, **BYTES)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return target


@pytest.fixture(scope="module")
def served(target, tmp_path_factory):
    """The target, and what it served: 24 answers and a file that is none."""
    folder = tmp_path_factory.mktemp("served")
    save(folder / "target.pt", target.config, target.state_dict(), {})
    (folder / "DIR").mkdir()
    for seed in range(24):
        leave(target, folder / "DIR", seed)
    (folder / "DIR/half.safetensors").write_bytes(b"half of it")
    return folder


def flags(served, out, *more, directory=None, draft="scratch"):
    given = ["learn", directory or served / "DIR", "--target", served / "target.pt", "--draft",
             draft, "--export", out, "--temperature", LAW[0], *more]
    return [str(x) for x in given]


def learn(*args, **more):
    engine.main([*flags(*args, **more), "--once"])


@pytest.fixture(scope="module")
def learned(served, tmp_path_factory):
    """What one run over all files wrote."""
    out = tmp_path_factory.mktemp("learned") / "OUT"
    learn(served, out, *FAST, "--every", "4", "--keep", "1000")
    return out


def versions(out):
    return sorted(path.name for path in out.glob("v*"))


def state_of(out):
    return torch.load(out / "learner.pt", weights_only=True)


# ---- what it learns and writes -------------------------------------------------------------------


def test_it_learns_from_what_was_served(target, learned):
    """On answers that it has not seen, the last version is expected to have half as many tokens
    more accepted as the first, and the head that is loaded back is the one that serves."""
    first, last = versions(learned)[0], versions(learned)[-1]
    assert first == "v000000" and (learned / "latest").read_text() == last + "\n"
    heads = [huggingface.load_draft(learned / name, target) for name in (first, last)]
    traces, accepted = [answered(target, HELD_OUT + i).trace() for i in range(4)], []
    for head in heads:
        lengths = [expected_length(head, t, TargetHead(target), 4, "block") for t in traces]
        accepted.append(sum(lengths) / 4 - 1)
    assert accepted[1] > 1.5 * accepted[0] + 0.02, accepted
    state = state_of(learned)
    assert state["answers"] == 24 and len(state["seen"]) == 25
    for name, weight in heads[1].state_dict().items():
        if name != "lm_head.weight":  # that may be kept apart from the target's
            assert torch.equal(weight, state["learner"]["average"][name])


def test_nothing_is_learned_twice_and_versions_are_whole(served, learned, tmp_path, capsys):
    assert not list(learned.glob("*.new")) and len(versions(learned)) > 4
    for name in versions(learned):
        there = sorted(path.name for path in (learned / name).iterdir())
        assert there == ["config.json", "model.safetensors"]
    before = versions(learned), state_of(learned)["answers"]
    learn(served, learned, *FAST, "--every", "4", "--keep", "1000")
    assert (versions(learned), state_of(learned)["answers"]) == before
    assert "skipped" not in capsys.readouterr().out.replace("0 files skipped", "")


def test_what_is_no_file_of_an_engine_is_skipped_in_one_line(served, tmp_path, capsys):
    learn(served, tmp_path / "OUT", *FAST, "--every", "100")
    lines = [x for x in capsys.readouterr().out.splitlines() if "half" in x]
    assert lines == ["half.safetensors skipped: not a whole safetensors file (SafetensorError)"]
    assert len(versions(tmp_path / "OUT")) >= 3  # day 0, the gate's first yes, the end


def test_read_files_and_old_versions_go_if_they_may(target, served, tmp_path):
    folder, out = tmp_path / "DIR", tmp_path / "OUT"
    folder.mkdir()
    (folder / "half.safetensors").write_bytes(b"half of it")
    for seed in range(6):
        leave(target, folder, seed)
    options = ["--learn-every", "12", "--keep", "2"]
    learn(served, out, *options, directory=folder)
    assert len(list(folder.iterdir())) == 13 and len(versions(out)) == 2
    for seed in range(6, 8):
        leave(target, folder, seed)
    learn(served, out, *options, "--delete", directory=folder)
    left = sorted(path.name.split(".")[0] for path in folder.glob("*.safetensors"))
    assert left == ["0", "1", "2", "3", "4", "5", "half"] and state_of(out)["answers"] == 8
    assert set(state_of(out)["seen"]) == {path.name for path in folder.glob("*.safetensors")}


def test_a_head_that_is_behind_is_dropped_for_what_it_began_with(served, learned, tmp_path, capsys):
    """A step so long that it ruins a good head.  A version may be ahead by chance on the first
    answers; every one that is said to be as it began is, the last one among them."""
    good, out = learned / versions(learned)[-1], tmp_path / "OUT"
    learn(served, out, "--lr", "3", "--learn-every", "24", draft=good)
    lines = capsys.readouterr().out.splitlines()
    assert any("is behind what it began with, and dropped" in line for line in lines)
    as_began = [name for name in versions(out)
                for line in lines if f"{name}: " in line and line.endswith("as it began")]
    assert (out / "latest").read_text() == as_began[-1] + "\n" and as_began[-1] != "v000000"
    began = load_file(good / "model.safetensors")
    for name in as_began:
        written = load_file(out / name / "model.safetensors")
        assert all(torch.equal(written[key], began[key]) for key in began)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swap_leaves_the_target_as_it_is(target, learned, dtype):
    """vLLM makes two lm_heads that are equal at load one matrix, and writes new weights into it."""
    theirs = target.lm_head.weight.detach().to(dtype).clone()
    before, names = theirs.clone(), versions(learned)
    own = load_file(learned / names[0] / "model.safetensors")["lm_head.weight"].to(dtype)
    matrix = theirs if torch.equal(own, theirs) else own
    matrix.copy_(load_file(learned / names[-1] / "model.safetensors")["lm_head.weight"])
    assert torch.equal(theirs, before)


# ---- its life ------------------------------------------------------------------------------------


@contextmanager
def started(served, out, directory):
    command = [sys.executable, "-m", "formats.engine", *flags(served, out, directory=directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *FAST], cwd=HOME, text=True, stdout=pipe, stderr=pipe) as new:
        try:
            yield new
        finally:
            new.kill()


def wait_for(process, out, answers):
    end = time.monotonic() + 300
    while not (out / "learner.pt").exists() or state_of(out)["answers"] < answers:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)


def test_killed_it_goes_on_where_it_was_and_asked_to_end_it_keeps_all(target, served, tmp_path):
    folder, out = tmp_path / "DIR", tmp_path / "OUT"
    folder.mkdir()
    for seed in range(6):
        leave(target, folder, seed)
    with started(served, out, folder) as process:
        wait_for(process, out, 2)
        process.kill()
    killed = state_of(out)
    assert 2 <= killed["answers"] <= 6

    with started(served, out, folder) as process:
        wait_for(process, out, 6)
        leave(target, folder, 6)  # while it watches
        wait_for(process, out, 7)
        process.send_signal(signal.SIGTERM)
        said, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert "7 answers" in said.splitlines()[-1] and "skipped:" not in said
    state = state_of(out)
    assert state["answers"] == 7 and state["learner"]["averaged"] > killed["learner"]["averaged"]
    names = versions(out)
    assert (out / "latest").read_text().strip() == names[-1] and len(names) == 3
    huggingface.load_draft(out / names[-1], target)


def test_what_cannot_go_on_is_refused(target, served, learned, tmp_path):
    with refused("is no folder"):
        learn(served, tmp_path / "OUT", directory=tmp_path / "none")
    with refused("no weights: nothing to learn"):
        learn(served, tmp_path / "OUT", draft="none")
    with refused("another draft's, or another version's"):
        learn(served, learned, "--draft-vocab", "100")
    (learned / ".lock").touch()
    with open(learned / ".lock") as lock, refused("another process is saving"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        learn(served, learned)
