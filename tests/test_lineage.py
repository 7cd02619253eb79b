"""The lineage: every change leaves a line, none holds text, and people can read what happened."""

import hashlib
import json
import random
import struct
from argparse import Namespace

import pytest
import torch

import aurora
from model import UserError
from support import explain, lineage
from support.store import load, save

from .tiny import tiny_draft, tiny_target

BYTES = dict(
    vocab_size=257, bos_token_id=256, suppress_tokens=(256,), max_position_embeddings=512
)
PROMPTS = [("secret one", "a"), ("secret two", "a"), ("secret three", "b"), ("secret four", "b")]


def serve(folder, *more):
    aurora.main(["--target", f"{folder}/target.pt", "--prompts", f"{folder}/p.jsonl", "--no-gate",
                 "--max-new-tokens", "12", "--learn-every", "12", "--num-speculative-tokens", "3",
                 *map(str, more)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs saved in `kept`, the second from where the first had come to."""
    folder = tmp_path_factory.mktemp("lineage")
    target = tiny_target(gain=2.0, **BYTES)
    save(folder / "target.pt", target.config, target.state_dict(), {})
    objects = [{"prompt": text, "class": kind} for text, kind in PROMPTS]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, objects)))
    serve(folder, "--save", folder / "kept")
    serve(folder, "--draft", folder / "kept", "--save", folder / "kept")
    return folder


def test_every_version_has_a_line_that_says_what_fed_it(folder):
    """Without a gate every answer makes a version, so each was fed by one request."""
    lines = lineage.read(folder / "kept")
    events = ["began", *["learned"] * 4, "kept"]
    assert [line["event"] for line in lines] == 2 * events
    assert [line["version"] for line in lines] == [None, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8]
    assert [line["parent"] for line in lines][1:5] == [None, 1, 2, 3]
    for i, line in enumerate(lines[7:11]):
        (fed,) = line["requests"]
        text, kind = PROMPTS[i]
        ids = struct.pack(f"<{1 + len(text)}q", 256, *text.encode())
        assert (fed["number"], fed["class"]) == (i, kind)
        assert fed["sha256"] == hashlib.sha256(ids).hexdigest()
        assert line["expected_length"] == {kind: [fed["began"], fed["learned"]]}
        assert line["steps"] == 1 and line["gradient_norm"] > 0 and line["loss"] is not None
        assert line["learn_seconds"] > 0 and line["tokens_per_second"] > 0
        assert (line["rule"], line["estimator"]) == ("block", "expected")
    assert lines[6]["draft"] == str(folder / "kept")


def test_the_hash_is_that_of_the_weights_on_the_disk(folder):
    lines = lineage.read(folder / "kept")
    for number in (4, 8):
        weights = load(folder / f"kept/v{number:06d}/draft.pt")[1]
        hashes = {line["sha256"] for line in lines if line["version"] == number}
        assert hashes == {lineage.hash_of_weights(weights)}
    learned = {line["sha256"] for line in lines if line["event"] == "learned"}
    assert len(learned) == 8


def test_the_lineage_holds_no_text_and_what_is_kept_is_the_owners(folder):
    assert "secret" not in (folder / "kept/lineage.jsonl").read_text()
    files = [path for path in (folder / "kept").rglob("*") if path.is_file()]
    assert len(files) == 7 and all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_a_line_that_was_cut_short_costs_no_other(tmp_path):
    lineage.append(tmp_path, "began", 1, None)
    with open(tmp_path / lineage.NAME, "a") as file:
        file.write('{"event": "learned", "vers')
    lineage.append(tmp_path, "learned", 2, 1)
    assert [line["version"] for line in lineage.read(tmp_path)] == [1, 2]


# ---- an older version again ----------------------------------------------------------------------


def test_a_rollback_is_a_new_version_and_loses_nothing(folder, tmp_path, capsys):
    """It serves and learns on as it was, under numbers that nobody had."""
    kept = folder / "kept"
    before = {path: path.read_bytes() for path in kept.glob("v*/*")}
    aurora.main(["--rollback", str(kept), "4"])
    assert "version 4 is the latest again, as version 9" in capsys.readouterr().out
    assert (kept / "latest").read_text().strip() == "v000009"
    assert all(path.read_bytes() == content for path, content in before.items())
    old, new = (load(kept / f"v{n:06d}/draft.pt")[1] for n in (4, 9))
    assert all(torch.equal(x, new[name]) for name, x in old.items())
    line = lineage.read(kept)[-1]
    assert line["event"] == "rolled back" and line["instead_of"] == 8
    assert (line["version"], line["parent"]) == (9, 4)
    assert line["sha256"] == lineage.hash_of_weights(old)
    serve(folder, "--draft", kept, "--save", tmp_path / "next")
    lines = lineage.read(tmp_path / "next")
    assert [line["version"] for line in lines] == [9, 10, 11, 12, 13, 13]
    assert lines[0]["sha256"] == line["sha256"]


@pytest.mark.parametrize("given, message", [
    (["--rollback", "KEPT", "3"], "keeps no version 3: expected one of 4, 8"),
    (["--rollback", "KEPT", "x"], "expected a version's number"),
    (["--rollback", "nowhere", "3"], "no directory nowhere"),
    (["--explain", "nowhere"], "nowhere holds no lineage.jsonl"),
    (["--explain", "KEPT", "--version", "99"], "knows no version 99"),
    (["--version", "3"], "--version goes with --explain"),
])
def test_what_is_not_there_is_one_clear_line(folder, given, message):
    with pytest.raises(UserError, match=message):
        aurora.main([str(folder / "kept") if word == "KEPT" else word for word in given])


# ---- in plain words ------------------------------------------------------------------------------


def test_explain_tells_every_change_and_a_curve_a_class(folder, capsys):
    aurora.main(["--explain", str(folder / "kept")])
    out = capsys.readouterr().out
    assert out.count("learned, and serves") == 8 and out.count("a run began with") == 2
    assert out.count("traffic shifted from a to b") == 2
    curves = [row for row in out.splitlines() if set(explain.BARS) & set(row)]
    assert [row.split()[0] for row in curves] == ["a", "b"]
    aurora.main(["--explain", str(folder / "kept"), "--version", "7"])
    out = capsys.readouterr().out
    assert "version 7, " in out and "gradient norm" in out and out.count("  request ") == 1


def test_what_is_slower_than_plain_decoding_is_told_once_and_so_is_its_end(tmp_path):
    """Tokens a second over plain's, answer by answer; nothing is said before the eighth, without a
    plain answer to compare with, and of what is within 5 % of plain."""
    draft = tiny_draft(tiny_target())
    args = Namespace(draft="x", rule="block", estimator="expected")
    story = lineage.Lineage(tmp_path, args, draft, 3)
    served, told = Namespace(outcome=None, request=None), []
    for ratio in [0.5] * 9 + [None, 0.96, 1.04, 0.9, 1.06, 0.96, 0.94]:
        plain = None if ratio is None else 40.0
        story.serve(served, {"tokens_per_second": 40 * (ratio or 0.1),
                             "plain_tokens_per_second": plain}, None)
        told.append(len(lineage.read(tmp_path)) - 1)
    assert told == [0] * 7 + [1] * 6 + [2, 2, 3]
    lines = lineage.read(tmp_path)[1:]
    assert [line["event"] for line in lines] == ["slower", "faster", "slower"]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([20, 42.4, 37.6])
    assert {line["version"] for line in lines} == {3}


def told(lengths):
    """What --explain says of one class of text, answer by answer, if a draft that does not learn
    can be expected to make so many tokens a round."""
    shifts = explain.Shifts()
    lines = [{"event": "learned", "requests": [{"class": "all", "began": x}]} for x in lengths]
    return [shift for line in lines for shift in shifts.of(line)]


def test_other_text_under_the_same_name_is_told_once():
    draws = random.Random(0)
    lengths = [draws.gauss(mean, 0.3) for mean in 40 * [2.5] + 40 * [1.7]]
    assert len(told(lengths)) == 1 and "the text of all shifted" in told(lengths)[0]


def test_steady_text_hardly_ever_shifts():
    """100 answers each, 300 times: about 2 % of them tell a shift that there is not."""
    draws = random.Random(0)
    alarms = sum(bool(told([draws.gauss(2.5, 0.3) for _ in range(100)])) for _ in range(300))
    assert alarms / 300 < 0.05


def test_each_kind_of_change_has_its_words():
    line = {"gate_mean": -0.3, "reason": "it hung", "draft": "static", "instead_of": 7, "parent": 2}
    words = {event: explain.words({"event": event} | line) for event in (
        "began", "learned", "set aside", "dropped", "stopped", "kept", "rolled back", "slower",
        "faster")}
    assert "behind by 0.30" in words["dropped"] and "it hung" in words["stopped"]
    assert "version 2 again, instead of 7" in words["rolled back"]
    assert len(set(words.values())) == 9
