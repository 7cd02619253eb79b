"""What cannot be used is refused: in one clear line, before it is tried."""

import os
import subprocess
import sys

import pytest
import torch

from model import UserError
from support import options
from support.store import save

from .serving import HERE, serve
from .tiny import tiny_target


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
    ("--static goes with --compare", ["--static", "TARGET"]),
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
