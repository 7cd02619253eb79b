"""Whatever becomes of the learner, the disk or the traffic: no answer is lost or changed."""

import json
import os
import signal
import time
from argparse import Namespace

import pytest
import torch

import aurora
from aurora import Arm
from learner import Learner, Outcome
from model import TargetHead, UserError
from support import explain, lineage, store
from support.background import Background
from support.draft_length import FixedLength
from support.store import save

from .serving import Running, lines_of
from .tiny import play, request, tiny_draft, tiny_target

REQUESTS = 6


# ---- the learner ---------------------------------------------------------------------------------


class Fails:
    """A learner that does as it is told with the second answer, and nothing with the others."""

    def __init__(self, how):
        self.how, self.seen = how, 0

    def update(self, trace):
        self.seen += 1
        if self.seen == 2:
            return getattr(self, self.how)()
        return Outcome(1.0)

    def raises(self):
        raise IndexError("no such row")

    def hangs(self):
        time.sleep(200)

    def dies(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def poisons(self):
        return Outcome(1.0, version=1, weights={"fc.weight": torch.full((2, 2), float("nan"))})

    def state(self):
        return {"seen": self.seen}


def answers(learner):
    target = tiny_target(gain=2.0)
    arm = Arm(tiny_draft(target), FixedLength(3))
    served = aurora.aurora(target, arm, learner, [request(seed=i) for i in range(REQUESTS)])
    return [x.generation.text[0] for x in served]


@pytest.mark.parametrize("how, process, reason", [
    ("raises", False, "IndexError: no such row"),
    ("raises", True, "IndexError: no such row"),
    ("poisons", False, "NaN or infinity"),
    ("hangs", True, "more than 0.5 seconds"),
    ("dies", True, "its process died"),
])
def test_a_learner_that_fails_is_said_once_and_serving_goes_on(how, process, reason, capsys):
    reason = reason.replace("its", "the learner's")
    learner = Background(Fails(how), process, limit=0.5)
    start = time.monotonic()
    assert answers(learner) == answers(None)
    assert learner.close() is None  # nobody knows what state it is in
    assert reason in learner.trouble and time.monotonic() - start < 60
    told = capsys.readouterr().err
    assert told.count("serving goes on without learning") == 1 and reason in told


def test_an_update_that_is_no_number_is_undone(capsys):
    """What serves stays, and what is kept is what was learned before."""
    target = tiny_target(gain=2.0)
    learner = Learner(tiny_draft(target), TargetHead(target), every=20, gate=False)
    traces = [play(target, None, [request(seed=i)], FixedLength(0))[0].trace() for i in range(3)]
    behind = Background(learner, process=False)
    behind.submit(traces[0])
    good = {name: w.clone() for name, w in behind.result().weights.items()}
    with torch.no_grad():
        learner.draft.fc.weight[0, 0] = float("nan")
    for trace in traces[1:]:
        behind.submit(trace)
        assert behind.result() is None
    assert "learning diverged" in behind.trouble
    assert capsys.readouterr().err.count("diverged") == 1
    state = behind.close()
    for name in ("draft", "average"):
        assert all(torch.equal(w, state[name][key]) for key, w in good.items())


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny byte-level target, and prompts for a few seconds."""
    folder = tmp_path_factory.mktemp("supervision")
    target = tiny_target(gain=2.0, vocab_size=257, bos_token_id=256, suppress_tokens=(256,))
    save(folder / "target.pt", target.config, target.state_dict(), {})
    (folder / "few.txt").write_text("one prompt of some\n" * 4)
    (folder / "many.txt").write_text("one prompt of many\n" * 120)
    return folder


def flags(files, prompts, *more):
    return ["--target", f"{files}/target.pt", "--prompts", f"{files}/{prompts}.txt",
            "--max-new-tokens", "12", "--learn-every", "12", "--num-speculative-tokens", "3",
            *map(str, more)]


def test_a_learner_that_is_killed_costs_no_request_and_the_lineage_says_so(files, tmp_path):
    with Running(files, tmp_path) as run:
        (learner,) = run.learner()
        os.kill(learner, signal.SIGKILL)
        out, err = run.process.communicate(timeout=120)
        assert run.process.returncode == 0, err
    assert err.count("the learner's process died") == 1 and "Traceback" not in err
    online = [x for x in lines_of(run.log) if x["arm"] == "online"]
    assert len(online) == 120 and "online" in out
    lines = lineage.read(run.kept)
    (stopped,) = [line for line in lines if line["event"] == "stopped"]
    assert "process died" in stopped["reason"] and lines[-1]["event"] == "kept"
    version = (run.kept / "latest").read_text().strip()
    assert int(version[1:]) == online[-1]["version"] > 0
    assert not (run.kept / version / "learner.pt").exists()


def test_a_crash_loses_no_line_and_its_numbers_are_not_given_again(files, tmp_path):
    with Running(files, tmp_path) as run:
        run.process.kill()
        run.process.communicate()
    served = max(x["version"] for x in lines_of(run.log))
    given = [line["version"] for line in lineage.read(run.kept) if line["event"] == "learned"]
    assert served > 0 and given == list(range(1, given[-1] + 1)) and given[-1] >= served
    aurora.main(flags(files, "few", "--no-gate", "--save", run.kept))
    events = [(line["event"], line["version"]) for line in lineage.read(run.kept)
              if line["event"] not in ("slower", "faster")]
    assert events[len(given) + 1] == ("began", None)
    assert events[len(given) + 2] == ("learned", given[-1] + 1)


def test_a_full_disk_ends_the_log_and_the_lineage_but_not_the_serving(files, tmp_path, capsys):
    """Both are on a device that is always full."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/lineage.jsonl").symlink_to("/dev/full")
    aurora.main(flags(files, "few", "--no-learn", "--save", tmp_path / "kept",
                      "--log", "/dev/full", "--report", tmp_path / "r.json"))
    err = capsys.readouterr().err
    assert err.count("the log ends here") == 1 == err.count("the lineage ends here")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["classes"]["prompts"]["online"]["requests"] == 4
    assert (tmp_path / "kept/v000000/draft.pt").is_file()


def test_a_state_that_was_not_kept_stands_in_the_lineage(tmp_path, monkeypatch):
    """The disk has no room for the learner's state: the draft is kept, is the latest, and has its
    line, which --explain tells; whoever asked is told too."""
    draft, whole = tiny_draft(tiny_target()), store.write

    def write(path, content):
        if path.name == "learner.pt":
            raise OSError(f"cannot write {path}: is the disk full?")
        return whole(path, content)

    monkeypatch.setattr(store, "write", write)
    with store.Store(tmp_path) as kept:
        number, lost = kept.write(3, draft, {"version": 3})
        args = Namespace(draft="x", rule="block", estimator="expected")
        lineage.Lineage(tmp_path, args, draft, None).keep(number, draft, {}, lost)
    assert number == 3 and (tmp_path / "latest").read_text() == "v000003\n"
    line = lineage.read(tmp_path)[-1]
    assert line["event"] == "kept" and line["version"] == 3
    assert "without the learner's state: cannot write" in explain.words(line)
    with store.Store(tmp_path) as kept:
        kept.roll_back(3)  # there is no state to lose


@pytest.mark.parametrize("name", ["draft.pt", "learner.pt"])
def test_a_truncated_version_is_refused_by_name_and_an_older_one_serves(files, tmp_path, name):
    kept = tmp_path / "kept"
    for _ in range(2):
        aurora.main(flags(files, "few", "--save", kept, "--no-gate"))
    first, second = sorted(path.name for path in kept.glob("v*"))
    broken = kept / second / name
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{second}/{name}"):
        aurora.main(flags(files, "few", "--draft", kept))
    aurora.main(["--rollback", str(kept), first[1:]])
    aurora.main(flags(files, "few", "--draft", kept, "--log", tmp_path / "l.jsonl"))
    assert len([x for x in lines_of(tmp_path / "l.jsonl") if x["arm"] == "online"]) == 4


# ---- where the cost lands ------------------------------------------------------------------------


def test_the_costs_are_those_of_the_lines_and_the_files(files, tmp_path, capsys):
    """Serving, waiting and remembering are all the seconds that tokens a second counts; bytes are
    those of the log and the version, and of a lineage that lacks its last line."""
    kept, log = tmp_path / "kept", tmp_path / "l.jsonl"
    aurora.main(flags(files, "few", "--no-gate", "--compare", "--save", kept, "--log", log,
                      "--report", tmp_path / "r.json", "--num-speculative-tokens", "auto"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["costs"]) == ["online", "plain", "static"]
    for arm, x in report["costs"].items():
        seconds, told = x["seconds"], report["classes"]["prompts"][arm]
        both = told["serve_seconds"] + told["wait_seconds"]
        assert sum(seconds[part] for part in ("serving", "waiting", "remembering")) == (
            pytest.approx(both))
        assert x["seconds_per_thousand_tokens"]["serving"] == pytest.approx(
            1000 * told["serve_seconds"] / x["tokens"])
        assert (seconds["learning"] > seconds["judging"] > 0) == (arm == "online")
        assert (seconds["writing"] > 0) == (arm == "online")
    online = report["costs"]["online"]
    written = [log, *kept.glob("v*/*"), kept / "lineage.jsonl"]
    last = len((kept / "lineage.jsonl").read_bytes().splitlines(keepends=True)[-1])
    total = sum(path.stat().st_size for path in written) - last
    assert online["megabytes_written"] == pytest.approx(total / 1e6)
    held = online["megabytes_held"]
    assert held["serving"] > held["memory"] > 0 and held["learning"] > 0
    assert "seconds per thousand tokens" in capsys.readouterr().out
    aurora.main(["--explain", str(kept)])
    assert "seconds per thousand tokens" in capsys.readouterr().out
