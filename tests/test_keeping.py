"""What was learned is kept, whatever fails, breaks or interrupts."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from model import UserError
from support.store import Store, load, save
from verify import NoDistribution

from .serving import HERE, Running, alive, flags, keep, lines_of, serve, wait_for


def versions(folder):
    return sorted(path.name for path in folder.glob("v*"))


def test_versions_go_on_where_they_were_and_overwrite_none(files, kept, tmp_path):
    """From --draft DIR, whose learner had four answers; then without learning, on top of that."""
    assert versions(kept / "draft") == ["v000004"]
    first = (kept / "draft/v000004/draft.pt").read_bytes()
    keep(files, tmp_path, "--draft", kept / "draft")
    online = [x for x in lines_of(tmp_path / "l.jsonl") if x["arm"] == "online"]
    assert [x["version"] for x in online] == [4, 4, 5, 6]
    assert versions(tmp_path / "draft") == ["v000008"]
    for names in ["v000004", "v000005"], ["v000004", "v000005", "v000006"]:
        serve(files, "--draft", kept / "draft/v000004", "--no-learn", "--save", kept / "draft")
        assert versions(kept / "draft") == names
        assert (kept / "draft/latest").read_text().strip() == names[-1]
    assert (kept / "draft/v000004/draft.pt").read_bytes() == first
    _, learned, _ = load(kept / "draft/v000004/draft.pt")
    _, served, _ = load(kept / "draft/v000006/draft.pt")
    assert all(torch.equal(x, served[name]) for name, x in learned.items())


def test_one_directory_is_saved_into_by_one_process(files, tmp_path):
    with Store(tmp_path / "kept"):
        with pytest.raises(UserError, match="another process is saving"):
            serve(files, "--no-learn", "--save", tmp_path / "kept")
    serve(files, "--no-learn", "--save", tmp_path / "kept")
    assert versions(tmp_path / "kept") == ["v000000"]


def test_a_report_that_cannot_be_written_loses_nothing_else(files, tmp_path, monkeypatch):
    """While it serves, a folder takes the report's place."""

    class Spoils(io.StringIO):
        def write(self, text):
            (tmp_path / "r.json").mkdir(exist_ok=True)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Spoils())
    with pytest.raises(OSError, match="directory"):
        serve(files, "--no-learn", "--save", tmp_path / "kept", "--report", tmp_path / "r.json")
    assert versions(tmp_path / "kept") == ["v000000"] and "online" in sys.stdout.getvalue()


def test_a_full_disk_is_one_line_and_loses_nothing_else(files, tmp_path):
    """No file may grow past 20 kB, so the draft cannot be kept: no version pretends that it was,
    nothing half written stays, and the table and the report are there."""
    more = flags(files, "--save", tmp_path / "kept", "--report", tmp_path / "r.json")
    code = (f"import resource, runpy, sys; sys.argv = {['aurora.py', *map(str, more)]!r}; "
            "import torch; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
            f"runpy.run_path({str(HERE / 'aurora.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"cannot write {tmp_path}/kept/" in done.stderr.splitlines()[-1]
    assert "online" in done.stdout and json.loads((tmp_path / "r.json").read_text())["classes"]
    left = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == [".lock", "lineage.jsonl"]


class Breaks(io.StringIO):
    """A pipe whose reader leaves after the first lines."""

    left = False

    def flush(self):
        self.left = True

    def write(self, text):
        if self.left:
            raise BrokenPipeError("broken pipe")
        return super().write(text)


def test_a_broken_pipe_loses_nothing_else(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Breaks())
    with pytest.raises(BrokenPipeError):
        serve(files, "--no-learn", "--save", tmp_path / "kept", "--report", tmp_path / "r.json")
    assert "traffic" in sys.stdout.getvalue()
    assert versions(tmp_path / "kept") == ["v000000"] and (tmp_path / "r.json").exists()


def test_a_target_that_gives_nan_loses_nothing_that_was_served(files, tmp_path):
    """It is one line, and no learner, report or log is lost by it."""
    config, weights, record = load(files / "target.pt")
    weights["lm_head.weight"] = 1e38 * weights["lm_head.weight"].sign()
    save(tmp_path / "t.pt", config, weights, record)
    with pytest.raises(NoDistribution):
        serve(files, "--target", tmp_path / "t.pt", "--no-learn", "--save", tmp_path / "kept",
              "--report", tmp_path / "r.json")
    assert versions(tmp_path / "kept") == ["v000000"] and (tmp_path / "r.json").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_was_learned_outlives_an_interruption(files, tmp_path, name):
    """A terminal sends Ctrl-C to the learner's process too, which leaves it to the other one."""
    with Running(files, tmp_path) as run:
        (learner,) = run.learner()
        os.kill(learner, getattr(signal, name))
        run.process.send_signal(getattr(signal, name))
        out, err = run.process.communicate(timeout=30)
        assert run.process.returncode == 0 and not alive(learner)
    assert "interrupted" in err and "Traceback" not in err and "online" in out
    served = [x for x in lines_of(run.log) if x["arm"] == "online"]
    (version,) = versions(run.kept)
    assert int(version[1:]) >= len(served) - 1  # the answer at hand may have been interrupted
    assert (run.kept / version / "learner.pt").exists()


def test_an_interruption_that_nobody_can_be_told_of_loses_nothing(files, tmp_path):
    with open("/dev/full", "w") as full, Running(files, tmp_path, stderr=full) as run:
        run.process.send_signal(signal.SIGINT)
        run.process.communicate(timeout=60)
    (version,) = versions(run.kept)
    assert int(version[1:]) > 0 and (run.kept / version / "learner.pt").is_file()


def test_more_signals_lose_nothing(files, tmp_path):
    """Whoever is impatient sends Ctrl-C again and again, and worse, until all is kept."""
    with Running(files, tmp_path) as run:
        (learner,) = run.learner()
        while not (run.kept / "latest").exists():
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                run.process.send_signal(name)
            time.sleep(0.002)
        out, err = run.process.communicate(timeout=30)
        assert run.process.returncode == 0 and not alive(learner)
    assert "Traceback" not in err and "online" in out
    (version,) = versions(run.kept)
    assert (run.kept / version / "learner.pt").exists()


def test_serving_without_learning_keeps_what_an_earlier_run_learned(files, tmp_path):
    """The learner's state goes along, so that a third run can go on learning."""
    kept = tmp_path / "kept"
    serve(files, "--save", kept)
    serve(files, "--draft", kept, "--no-learn", "--save", kept)
    first, second = versions(kept)
    before, after = (torch.load(kept / v / "learner.pt") for v in (first, second))
    assert before["version"] == after["version"] > 0
    assert all(torch.equal(w, after["draft"][name]) for name, w in before["draft"].items())


def test_no_learner_outlives_its_master(files, tmp_path):
    with Running(files, tmp_path) as run:
        (learner,) = run.learner()
        run.process.kill()
        wait_for(lambda: not alive(learner), 20)
