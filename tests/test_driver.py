"""The command line: what it reports, what it keeps whatever happens, and what it refuses."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import aurora
from generation import Generation, Request
from model import UserError
from support import options
from support.draft_length import HEAD, PLAIN, REQUEST, FixedLength
from support.store import Store, load, save
from verify import NoDistribution

from .tiny import play, tiny_target

HERE = Path(aurora.__file__).parent
BYTES = dict(
    vocab_size=257, bos_token_id=256, suppress_tokens=(256,), max_position_embeddings=512
)
ARMS = ("plain", "static", "online")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny byte-level target, prompts of two classes, and more of them than anyone waits for."""
    folder = tmp_path_factory.mktemp("driver")
    target = tiny_target(gain=2.0, **BYTES)
    save(folder / "target.pt", target.config, target.state_dict(), {})
    prompts = [{"prompt": f"prompt {i}", "class": "ab"[i // 2]} for i in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "many.txt").write_text("one prompt of many\n" * 5000)
    return folder


def flags(files, *more, prompts="prompts.jsonl"):
    given = ["--target", f"{files}/target.pt", "--max-new-tokens", "12", "--learn-every", "12"]
    if "--prompt" not in more and "--prompts" not in more:
        given += ["--prompts", f"{files}/{prompts}"]
    if "--num-speculative-tokens" not in more:
        given += ["--num-speculative-tokens", "3"]
    return [*given, *map(str, more)]


def serve(files, *more):
    aurora.main(flags(files, *more))


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_clock(x):
    """A line of the log, but for what a clock measured."""
    if not isinstance(x, dict):
        return x
    return {key: without_clock(value) for key, value in x.items() if "seconds" not in key}


@pytest.fixture(scope="module")
def kept(files, tmp_path_factory):
    """One run that compares, learns and saves; --no-gate makes every answer a version."""
    folder = tmp_path_factory.mktemp("kept")
    keep(files, folder, "--draft", "scratch")
    return folder


def keep(files, folder, *more):
    serve(files, "--compare", "--no-gate", "--save", folder / "draft", *more,
          "--report", folder / "r.json", "--log", folder / "l.jsonl")


# ---- what it reports -----------------------------------------------------------------------------


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


# ---- what it keeps -------------------------------------------------------------------------------


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


class Running:
    """aurora.py as a process that serves on and on, learning, once it has served a few requests."""

    def __init__(self, files, folder):
        self.log, self.kept = folder / "l.jsonl", folder / "kept"
        more = flags(files, "--save", self.kept, "--log", self.log, "--no-gate", prompts="many.txt")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "aurora.py", *more], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        wait_for(lambda: self.log.exists() and len(self.log.read_text().splitlines()) >= 8)

    def learner(self):
        """The process ids of the learner: what the main process has spawned."""
        found = []
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children"
                          ).read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


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


# ---- what it refuses -----------------------------------------------------------------------------

NAMES = ("FOLDER", "TARGET", "NUMBER", "DEEP", "EMPTY", "BLANK", "LATIN", "SURROGATE", "FIFO",
         "AGAIN", "LINK", "HARD", "PROMPTS", "OTHER", "HALF", "HALF/draft.pt", "OLD")

BAD = [
    ("no checkpoint at", ["--target", "nowhere.pt"]),
    ("not a checkpoint", ["--target", __file__]),
    ("not byte-level", ["--target", "OTHER"]),
    ("unrecognized", ["--frobnicate"]),
    ("invalid choice", ["--estimator", "magic"]),
    ("--seed", ["--seed", "99999999999999999999999"]),
    ("--requests", ["--requests", str(2**63)]),
    ("--max-new-tokens", ["--max-new-tokens", "-1"]),
    ("--memory-tokens", ["--memory-tokens", "9" * 30]),
    ("--num-speculative-tokens", ["--num-speculative-tokens", "0"]),
    ("--seed", ["--seed", "9" * 5000]),
    ("--temperature", ["--temperature", "1e308"]),
    ("--temperature", ["--temperature", "nan"]),
    ("--temperature", ["--temperature", "-1"]),
    ("--temperature", ["--temperature", "1e-9"]),
    ("--top-p", ["--top-p", "0"]),
    ("--lr", ["--lr", "inf"]),
    ("--device nonsense", ["--device", "nonsense"]),
    ("--device meta", ["--device", "meta"]),
    ("--traffic perl", ["--traffic", "python,perl"]),
    ("prompt is empty", ["--prompt", ""]),
    ("not valid Unicode", ["--prompt", "\udc80"]),
    ("do not fit", ["--prompt", "x" * 500]),
    ("--prompt only answers", ["--prompt", "x", "--save", "FOLDER"]),
    ("cannot read", ["--prompts", "nowhere.txt"]),
    ("cannot read", ["--prompts", "FOLDER"]),
    ("expected UTF-8", ["--prompts", "LATIN"]),
    ("expected UTF-8", ["--prompts", "DEEP"]),
    ("that is empty", ["--prompts", "NUMBER"]),
    ("that is empty", ["--prompts", "EMPTY"]),
    ("that is empty", ["--prompts", "BLANK"]),
    ("not valid Unicode", ["--prompts", "SURROGATE"]),
    ("different places", ["--log", "AGAIN"]),
    ("different places", ["--log", "LINK"]),
    ("different places", ["--log", "HARD"]),
    ("different places", ["--report", "PROMPTS"]),
    ("different places", ["--log", "TARGET"]),
    ("different places", ["--log", "same", "--report", "./same"]),
    ("different places", ["--save", "both", "--export", "./both/"]),
    ("different places", ["--save", "kept", "--log", "kept/log"]),
    ("different places", ["--draft", "HALF", "--log", "HALF/draft.pt"]),
    ("--num-speculative-tokens K is the head's", ["--draft", "none"]),
    ("--num-speculative-tokens K is the head's", ["--memory", "request"]),
    ("cannot write", ["--log", "FOLDER"]),
    ("cannot write", ["--report", "/nowhere/at/all.json"]),
    ("cannot write", ["--report", "FIFO"]),
    ("cannot save in", ["--save", "TARGET"]),
    ("needs a directory", ["--save", ""]),
    ("holds no `latest`", ["--draft", "FOLDER"]),
    ("cannot be read", ["--draft", "HALF"]),
    ("another version's", ["--draft", "OLD"]),
    ("--draft-vocab goes with", ["--draft", "static", "--draft-vocab", "9"]),
    ("nothing to --save", ["--draft", "none", "--save", "FOLDER", "--num-speculative-tokens",
                           "auto"]),
]


@pytest.fixture(scope="module")
def bad(files, kept, tmp_path_factory):
    """What the names in BAD stand for."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "number.JSONL").write_text('{"prompt": 1}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "blank.jsonl").write_text('{"prompt": "x"}\n{"prompt": ""}\n')
    (folder / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    (folder / "surrogate.jsonl").write_text('{"prompt": "\\udc80"}\n')
    (folder / "link").symlink_to(files / "prompts.jsonl")
    (folder / "hard").hardlink_to(files / "prompts.jsonl")
    os.mkfifo(folder / "fifo")
    other = tiny_target()
    save(folder / "other.pt", other.config, other.state_dict(), {})
    (folder / "half").mkdir()
    (folder / "half/draft.pt").write_bytes((folder / "other.pt").read_bytes())
    (folder / "half/learner.pt").write_text("no learner")
    (folder / "old").mkdir()
    (folder / "old/draft.pt").write_bytes((kept / "draft/v000004/draft.pt").read_bytes())
    torch.save({"version": 1}, folder / "old/learner.pt")
    again = f"{files}/../{files.name}/./prompts.jsonl"
    paths = [folder, files / "target.pt", folder / "number.JSONL", folder / "deep.jsonl",
             folder / "empty.txt", folder / "blank.jsonl", folder / "latin.txt",
             folder / "surrogate.jsonl", folder / "fifo", again, folder / "link", folder / "hard",
             files / "prompts.jsonl", folder / "other.pt", folder / "half",
             folder / "half/draft.pt", folder / "old"]
    return dict(zip(NAMES, map(str, paths), strict=True))


@pytest.mark.parametrize("message, given", BAD)
def test_bad_input_is_one_clear_line(files, bad, message, given):
    before = {path: path.stat().st_size for path in files.iterdir()}
    with pytest.raises(UserError) as error:
        serve(files, *(bad.get(word, word) for word in given))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert before == {path: path.stat().st_size for path in files.iterdir()}


def test_bad_input_exits_with_2_and_no_traceback():
    command = [sys.executable, HERE / "aurora.py", "--target", "nowhere.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("aurora: ") and done.stderr.count("\n") == 1


def test_prompts_are_what_the_file_says(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n")
    pairs = options.read_prompts(str(tmp_path / "bom.txt"))
    assert pairs == [("prompts", "one"), ("prompts", " two ")]
    (tmp_path / "P.JSONL").write_bytes(b'\xef\xbb\xbf{"prompt": "x", "class": 7}\n{"prompt": "y"}')
    assert options.read_prompts(str(tmp_path / "P.JSONL")) == [("7", "x"), ("prompts", "y")]


# ---- where an answer ends ------------------------------------------------------------------------


class Says:
    """A draft that proposes what it is told, at temperature 0.  text: the whole one, prompt too."""

    def __init__(self, *texts):
        self.texts = texts

    def new_cache(self, batch, length):
        return None

    def propose(self, features, tokens, positions, last, coins, sampling, floors, cache):
        rows = []
        for b, text in enumerate(self.texts):
            start = int(positions[b, last[b]]) + 2
            rows.append([*text, *[0] * 99][start : start + len(floors)])
        drafted = torch.tensor(rows)
        logits = torch.full((*drafted.shape, 257), float("-inf"))
        return drafted, logits.scatter(-1, drafted[..., None], 0.0), torch.zeros(drafted.shape)


PROMPT = [256, *b"abcabc"]


def greedy(target, prompt=PROMPT, new=12):
    return play(target, None, [Request(prompt, new, 0, 0.0)], FixedLength(0))[0].text[0]


def distinct(text):
    """Prompt and target of which the first five tokens of the greedy answer differ."""
    return len(set(text[len(PROMPT) : len(PROMPT) + 5])) == 5


@pytest.fixture(scope="module")
def target():
    for seed in range(200):
        made = tiny_target(seed, gain=2.0, **BYTES)
        if distinct(greedy(made)):
            return made
    raise AssertionError("no such target")


def ending(target, text, place):
    """The same target, for which the token at this place of the answer is the end token."""
    other = tiny_target(0, **BYTES | dict(eos_token_ids=(text[len(PROMPT) + place],)))
    other.load_state_dict(target.state_dict())
    return other


@pytest.mark.parametrize("place, rounds", [
    (0, [(1, 1, 1)]),  # drafted, accepted, committed: 1 of 1
    (2, [(3, 3, 3)]),
    (3, [(3, 3, 4)]),  # the target's own
    (4, [(3, 3, 4), (1, 1, 1)]),
])
def test_an_end_token_ends_the_answer(target, place, rounds):
    """Drafted and kept it is an accepted token like any other, and nothing follows it."""
    text = greedy(target)
    target, draft = ending(target, text, place), Says(text)
    generation, _ = play(target, draft, [Request(PROMPT, 12, 0, 0.0)], FixedLength(3))
    assert generation.answer() == text[len(PROMPT) :][: place + 1]
    told = [(x.drafted, x.accepted, x.committed) for x in generation.rounds[0]]
    assert told == rounds and {x.source for x in generation.rounds[0]} == {HEAD}
    trace = generation.trace()
    assert trace.ids.tolist() == text[: len(PROMPT) + place + 1]
    assert trace.committed.tolist() == [x[2] for x in rounds]
    assert (trace.draft_tokens >= 0).sum(1).tolist() == [x[0] for x in rounds]
    for row, (drafted, _, _) in zip(trace.draft_tokens, rounds):
        assert (row[:drafted] >= 0).all() and (row[drafted:] == -1).all()
    assert len(trace.answer_hidden()) == place + 1 and len(trace.features) == len(trace.ids) - 1


def test_an_end_token_that_is_rejected_ends_nothing(target):
    text = greedy(target)
    end = next(token for token in range(256) if token not in text)
    other = tiny_target(0, **BYTES | dict(eos_token_ids=(end,)))
    other.load_state_dict(target.state_dict())
    wrong = [*PROMPT, end, *text[len(PROMPT) + 1 :]]
    generation, _ = play(other, Says(wrong), [Request(PROMPT, 12, 0, 0.0)], FixedLength(3))
    assert generation.text[0] == text
    first = generation.rounds[0][0]
    assert (first.drafted, first.accepted, first.committed) == (1, 0, 1)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("source", [HEAD, REQUEST])
def test_an_answer_is_as_long_as_it_may_be(target, source, K, new):
    """The draft is right all along; the last token is the target's, and only what is in the answer
    counts as accepted."""
    text = greedy(target)
    request = Request(PROMPT, new, 0, 0.0)
    generation, _ = play(target, Says(text), [request], FixedLength(K, source), own_memory=True)
    assert generation.answer() == text[len(PROMPT) :][:new]
    assert generation.rounds[0][0].drafted == min(K, new - 1)  # the memory knows "abcabc" as well
    for x in generation.rounds[0]:
        assert x.committed == x.accepted + 1 and x.accepted <= x.drafted <= K
    if source == HEAD:
        expected = [K + 1] * (new // (K + 1)) + [new % (K + 1)] * (new % (K + 1) > 0)
        assert [x.committed for x in generation.rounds[0]] == expected


def test_a_row_that_has_ended_stands_still(target):
    """Beside one that goes on, which is what it is alone."""
    text = greedy(target)
    requests = [Request(PROMPT, 2, 0, 0.0), Request(PROMPT, 12, 0, 0.0)]
    generation, _ = play(target, Says(text, text), requests, FixedLength(3))
    assert generation.text == [text[: len(PROMPT) + 2], text]
    alone, _ = play(target, Says(text), [requests[1]], FixedLength(3))
    assert generation.rounds[1] == alone.rounds[0] and len(generation.rounds[0]) == 1
    assert generation.trace(0).ids.tolist() == generation.text[0]


def test_answers_that_end_early_are_counted_as_long_as_they_are(files, tmp_path):
    """A target with 64 end tokens, sampled: --log knows the length and who said what."""
    config, weights, record = load(files / "target.pt")
    config.eos_token_ids = tuple(range(64))
    save(tmp_path / "t.pt", config, weights, record)
    serve(files, "--target", tmp_path / "t.pt", "--no-learn", "--log", tmp_path / "l.jsonl",
          "--compare")
    lines = lines_of(tmp_path / "l.jsonl")
    assert 1 <= min(x["tokens"] for x in lines) < 12
    for x in lines:
        rounds = x["rounds"] + x["plain_rounds"]
        assert sum(x["tokens_by_source"].values()) == x["tokens"] <= 12
        assert x["accepted"] + rounds - 1 <= x["tokens"] <= x["accepted"] + rounds


def test_a_generation_of_nobodys_draft_is_plain(target):
    generation = Generation(target, None, [Request(PROMPT, 3, 0, 1.0)])
    while not generation.done:
        drafted = generation.draft_tokens(FixedLength(0).choose({}))
        generation.commit(drafted, *generation.verify(drafted))
    assert [(x.source, x.drafted, x.committed) for x in generation.rounds[0]] == 3 * [(PLAIN, 0, 1)]
