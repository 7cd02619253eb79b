"""What measures and shows: the lines of bench.arms as a picture, and a round in slow motion."""

import json
import re

import pytest

from bench import picture, profile, slow_motion
from model import UserError
from support.draft_length import HEAD, REQUEST, Plan

from .tiny import tiny_draft, tiny_target


def lines(speeds, seeds=2, requests=6):
    """As of bench.arms --json: every arm at its speed in every request, of two classes."""
    return [{"seed": seed, "class": "ab"[i // 3], "number": i % 3, "arm": arm, "tokens": 50,
             "rounds": 20, "seconds": (1 + i) / speed, "accepted": {}}
            for seed in range(seeds) for i in range(requests) for arm, speed in speeds.items()]


def test_the_picture_shows_each_arm_over_plain_decoding():
    svg = picture.svg(lines({"plain": 2.0, "head": 2.5, "both": 4.0}), window=2)
    assert re.findall(r">(\d\.\d\d)  (\w+)</text>", svg) == [("2.00", "both"), ("1.25", "head")]
    assert svg.count("<polyline") == 2 and all(f">{kind}</text>" in svg for kind in "ab")
    for points in re.findall(r'points="([^"]*)"', svg):  # the ratio never changes: a level line
        assert len(points.split()) == 6 and len({p.split(",")[1] for p in points.split()}) == 1


def test_a_window_reaches_back_and_no_further():
    slow = lines({"plain": 1.0}, seeds=1)
    assert picture.running(picture.placed(slow), 1)[5] == pytest.approx(50 / 6)
    assert picture.running(picture.placed(slow), 2)[5] == pytest.approx(100 / 11)


def test_what_is_no_picture_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x").write_text(json.dumps({"arm": "plain"}))
    for name in ("x", "missing"):
        monkeypatch.setattr("sys.argv", ["picture", str(tmp_path / name)])
        with pytest.raises(UserError, match="no lines of bench.arms"):
            picture.main()


@pytest.mark.parametrize("seed", ["0", "3"])
def test_slow_motion_tells_what_the_coins_say(seed, capsys, monkeypatch):
    """The rows of its table say which coins are less; the lines below follow from them."""
    monkeypatch.setattr("sys.argv", ["verify.py", "--seed", seed])
    slow_motion.main()
    out = capsys.readouterr().out
    rows = re.findall(r"^  \d  '.*?' +(?:[\d.]+ +){4}(>=|<) min\(1, ratio\) +(>=|<) h", out, re.M)
    assert len(rows) == slow_motion.K
    token, block = (int(n) for n in re.findall(r"It keeps (\d) of 4", out))
    assert token == ([r[0] for r in rows] + [">="]).index(">=")
    assert block == max([i + 1 for i, r in enumerate(rows) if r[1] == "<"], default=0) > token


def test_a_profile_is_of_one_round_of_the_kind_it_names():
    target = tiny_target()
    draft = tiny_draft(target)
    for plan in (Plan(), Plan(HEAD, 3, [0.0] * 3), Plan(REQUEST, 4)):
        work, took = profile.a_round(target, draft, plan, "block")
        assert set(took) == set(profile.STEPS) and all(s > 0 for s in took.values())
        assert [(r.source, r.drafted) for r in work.rounds[0]] == [(plan.source, plan.K)] * 2
