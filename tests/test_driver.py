"""The command line: what it reports."""

import json

import pytest

from .serving import ARMS, keep, lines_of, serve, without_clock


def test_compare_reports_every_arm_of_every_class(kept):
    report = json.loads((kept / "r.json").read_text())
    assert list(report["classes"]) == ["a", "b"] and report["config"]["max_new_tokens"] == 12
    for arms in report["classes"].values():
        assert tuple(arms) == ARMS
        for name, arm in arms.items():
            assert arm["requests"] == 2 and arm["tokens"] == 24
            assert (arm["rounds"] == 0) == (name == "plain")
            assert sum(arm["tokens_by_source"].values()) == 24
            assert arm["tokens_per_second"] == pytest.approx(
                24 / (arm["serve_seconds"] + arm["wait_seconds"]))


def test_the_log_has_a_line_a_request_and_arm(kept):
    lines = lines_of(kept / "l.jsonl")
    assert len(lines) == 4 * 3
    for arm in ARMS:
        assert [x["class"] for x in lines if x["arm"] == arm] == ["a", "a", "b", "b"]
    for x in lines:
        histogram = x["acceptance_histogram"]
        assert x["tokens"] == 12 == x["accepted"] + x["rounds"] + x["plain_rounds"]
        assert x["arm"] == "plain" or sum(histogram) == x["rounds"]
        assert sum(n * rounds for n, rounds in enumerate(histogram)) == x["accepted"]
    online = [x for x in lines if x["arm"] == "online"]
    assert [x["version"] for x in online] == [0, 0, 1, 2]  # an answer late
    assert online[0]["learned_before"] is None
    assert [x["learned_before"]["version"] for x in online[1:]] == [1, 2, 3]
    static = [x for x in lines if x["arm"] == "static"]
    assert [x["accepted"] for x in static[:2]] == [x["accepted"] for x in online[:2]]


def test_the_same_seed_gives_the_same_run(files, kept, tmp_path):
    """The learner works beside serving, yet nothing depends on a clock."""
    keep(files, tmp_path, "--draft", "scratch")
    one, other = lines_of(kept / "l.jsonl"), lines_of(tmp_path / "l.jsonl")
    assert list(map(without_clock, one)) == list(map(without_clock, other))


def said(capsys, files, *more):
    capsys.readouterr()
    serve(files, "--prompt", "hello there", *more)
    return capsys.readouterr()


def test_a_seed_makes_the_answer(files, capsys):
    told = said(capsys, files, "--seed", 1)
    assert "\033" not in told.out and "12 tokens" in told.err
    assert said(capsys, files, "--seed", 1).out == told.out
    assert said(capsys, files, "--seed", 2).out != told.out


def test_a_greedy_answer_is_the_targets_own_whoever_drafts(files, kept, capsys):
    def answer(*more):
        return said(capsys, files, "--temperature", 0, *more).out

    plain = answer("--draft", "none", "--memory", "off", "--num-speculative-tokens", "auto")
    assert len(plain) >= 3 and answer("--rule", "token") == plain
    assert answer("--draft", kept / "draft", "--num-speculative-tokens", "auto") == plain


def test_class_names_are_shown_as_they_are_written(files, tmp_path, capsys):
    """Control characters would paint the terminal, and a lone surrogate cannot be printed."""
    names = ["\x1b[31mred\r", "\ud800"]
    lines = [json.dumps({"prompt": "some text", "class": name}) for name in names]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    serve(files, "--prompts", tmp_path / "p.jsonl", "--no-learn", "--log", tmp_path / "l.jsonl",
          "--report", tmp_path / "r.json")
    told = capsys.readouterr()
    assert "\x1b[31m" not in told.out + told.err and r"\x1b[31mred\r" in told.out
    assert r"\ud800" in told.out
    online = [x for x in lines_of(tmp_path / "l.jsonl") if x["arm"] == "online"]
    assert [x["class"] for x in online] == names
    assert list(json.loads((tmp_path / "r.json").read_text())["classes"]) == names
