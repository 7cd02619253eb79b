"""Files as vLLM's extract_hidden_states writes them, made here: read, refused, and found."""

import fcntl
import os
from pathlib import Path

import pytest
import torch

from formats.hidden_states import new_files, read_trace, remove
from learner import Learner, expected_length
from model import TargetHead
from support.draft_length import FixedLength
from tests.test_formats import refused
from tests.tiny import play, request, tiny_draft, tiny_target

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

BYTES = dict(vocab_size=257, bos_token_id=256, suppress_tokens=(256,))
LAW, CONTEXT = (0.5, 1.0, 0), 256


@torch.no_grad()
def hidden_states(target, ids):
    """(T, 4, D): what enters the feature layers, and what leaves the last one, before the norm."""
    last = []
    hook = target.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0][0]))
    _, features = target(ids[None])
    hook.remove()
    return torch.stack([*features[0].chunk(3, dim=-1), *last], dim=1)


def answered(target, seed, new=48):
    """An answer of the target alone -> its Generation."""
    asked = request(new=new, seed=seed, temperature=LAW[0])
    return play(target, None, [asked], FixedLength(0))[0]


def leave(target, folder, seed, new=48):
    """An answer, as the engine would leave it; its empty lock file stays there."""
    generation = answered(target, seed, new)
    ids = torch.tensor(generation.text[0][:-1])
    path = folder / f"{seed}.{len(generation.requests[0].prompt)}.safetensors"
    save_file({"token_ids": ids, "hidden_states": hidden_states(target, ids)}, path)
    Path(f"{path}.lock").touch()
    return path, generation.trace()


@pytest.fixture(scope="module")
def target():
    return tiny_target(gain=2.0, **BYTES)


# ---- one file ------------------------------------------------------------------------------------


def test_a_file_is_the_trace_of_its_answer_without_drafts(target, tmp_path):
    """But for the last token, whose place the engine never read."""
    path, trace = leave(target, tmp_path, 0)
    back = read_trace(path, target, LAW, CONTEXT)
    assert torch.equal(back.ids, trace.ids[:-1]) and back.prompt_length == trace.prompt_length
    torch.testing.assert_close(back.features, trace.features[:-1], atol=2e-3, rtol=0)
    torch.testing.assert_close(back.answer_hidden(), trace.answer_hidden()[:-1], atol=2e-3, rtol=0)
    assert not back.drafted().any() and back.temperature == LAW[0]
    assert torch.equal(back.starts, trace.starts[:-1])  # plain rounds, one for every token
    draft, head = tiny_draft(target), TargetHead(target)
    lengths = [expected_length(draft, t, head, 4, "block", most=47) for t in (back, trace)]
    assert lengths[0] == pytest.approx(lengths[1], abs=0.05) and lengths[0] > 1
    assert Learner(draft, head, every=24).update(back).loss is not None


def test_without_the_prompts_length_all_of_the_text_teaches(target, tmp_path):
    path, trace = leave(target, tmp_path, 0)
    path = path.rename(tmp_path / "0.safetensors")
    back = read_trace(path, target, LAW, CONTEXT)
    T = len(trace.ids) - 1
    assert back.prompt_length == 2 and back.answer_hidden().shape == (T - 2, 32)
    hidden = read_trace(path.rename(tmp_path / f"0.{trace.prompt_length}.safetensors"), target,
                        LAW, CONTEXT).answer_hidden()
    assert torch.equal(back.answer_hidden()[trace.prompt_length - 2 :], hidden)


def test_half_precision_is_read(target, tmp_path):
    path, trace = leave(target, tmp_path, 0)
    whole = load_file(path)
    save_file(whole | {"hidden_states": whole["hidden_states"].bfloat16()}, path)
    back = read_trace(path, target, LAW, CONTEXT)
    assert back.features.dtype == torch.float32
    torch.testing.assert_close(back.features, trace.features[:-1], atol=0.1, rtol=0.01)


def nan_at(states):
    states[5, 1, 3] = float("nan")
    return states


WRONG = [  # what is said, and what becomes of token_ids and hidden_states
    ("holds no token_ids", lambda ids, states: {"weight": states}),
    ("expected int64", lambda ids, states: (ids.float(), states)),
    ("expected int64", lambda ids, states: (ids[:, None], states)),
    ("expected int64", lambda ids, states: (ids[0].clone(), states)),
    (r"of layers \[2, 4, 5, 8\]", lambda ids, states: (ids, states[:, :3].contiguous())),
    ("expected floats", lambda ids, states: (ids, states[..., :16].contiguous())),
    ("expected floats", lambda ids, states: (ids[:-1], states)),
    ("expected floats", lambda ids, states: (ids, states.long())),
    ("NaN, infinity or numbers beyond", lambda ids, states: (ids, nan_at(states))),
    ("NaN, infinity or numbers beyond", lambda ids, states: (ids, states * float("inf"))),
    ("NaN, infinity or numbers beyond", lambda ids, states: (ids, states * 1e30)),
    ("not all in 0..256", lambda ids, states: (ids + 1000, states)),
    ("not all in 0..256", lambda ids, states: (ids - 1000, states)),
    ("ask for include_output_tokens", lambda ids, states: (ids[:10], states[:10].contiguous())),
    ("more than the draft's context of 256",
     lambda ids, states: (ids.repeat(5), states.repeat(5, 1, 1))),
    ("no likelier than chance", lambda ids, states: (ids, states.flip(2).contiguous())),
]


@pytest.mark.parametrize("message, change", WRONG)
def test_what_cannot_be_learned_from_is_refused(target, tmp_path, message, change):
    path, _ = leave(target, tmp_path, 0)
    whole = load_file(path)
    changed = change(whole["token_ids"], whole["hidden_states"])
    if isinstance(changed, tuple):
        changed = dict(zip(("token_ids", "hidden_states"), changed))
    save_file(changed, path)
    with refused(message):
        read_trace(path, target, LAW, CONTEXT)


def test_hidden_states_of_another_target_are_refused(target, tmp_path):
    path, _ = leave(tiny_target(seed=5, gain=2.0, **BYTES), tmp_path, 0)
    with refused("no likelier than chance"):
        read_trace(path, target, LAW, CONTEXT)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_half_a_file_is_refused(target, tmp_path, size):
    path, _ = leave(target, tmp_path, 0)
    path.write_bytes(path.read_bytes()[:size])
    with refused("not a whole safetensors file"):
        read_trace(path, target, LAW, CONTEXT)


# ---- a folder ------------------------------------------------------------------------------------


def test_files_are_taken_in_their_order_and_none_while_it_is_written(tmp_path):
    for i, name in enumerate("cab"):
        (tmp_path / f"{name}.safetensors").write_text(name)
        os.utime(tmp_path / f"{name}.safetensors", (i, i))
    (tmp_path / "other.txt").touch()
    (tmp_path / "folder.safetensors").mkdir()
    found = new_files(tmp_path, {})
    assert [path.name[0] for _, path in found] == ["c", "a", "b"]
    seen = {path.name: stamp for stamp, path in found}
    assert new_files(tmp_path, seen) == []
    (tmp_path / "a.safetensors").write_text("to its end")  # it had been half there
    assert [path.name[0] for _, path in new_files(tmp_path, seen)] == ["a"]
    with open(tmp_path / "a.safetensors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert new_files(tmp_path, seen) == []
    assert len(new_files(tmp_path, seen)) == 1  # the lock's file is still there
    remove(tmp_path / "a.safetensors")
    assert not list(tmp_path.glob("a.*")) and new_files(tmp_path, seen) == []
