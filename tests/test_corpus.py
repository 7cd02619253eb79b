"""The text that is trained on and served."""


import numpy as np
import pytest

from model import UserError
from support import corpus


def test_held_out_lines_are_not_trained_on():
    """No line of 60 characters or more is in two splits, nor in two classes.  (Of two of the three
    classes: reading the third takes half a minute.)"""
    home = {}
    for kind, splits in corpus.corpus(("python", "cpp")).items():
        for split, texts in splits.items():
            assert all(corpus.split_of(name) == split for name, _ in texts)
            for line in corpus.lines_of(texts):
                if len(line) >= 60:
                    assert home.setdefault(line, (kind, split)) == (kind, split), line


def runs_of_four(text):
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}


@pytest.fixture(scope="module")
def traffic():
    """[(class, name, text)] of this machine."""
    return list(corpus.documents(("traffic",)))


def test_docs_are_cut_out_of_the_source(traffic):
    docs = {name: text for kind, name, text in traffic if kind == "docs"}
    found = [(name, text) for kind, name, text in traffic if kind == "python" and name in docs]
    assert len(found) > 20 and all(corpus.split_of(name) == "traffic" for _, name, _ in traffic)
    for name, text in found:  # a short docstring may share an example of a few words
        both = runs_of_four(docs[name]) & runs_of_four(text)
        assert not [run for run in both if len("".join(run)) >= 120], name


def test_only_what_is_asked_for_is_read(traffic, monkeypatch):
    monkeypatch.setattr(corpus, "long_docstrings", lambda source: pytest.fail("a file was parsed"))
    asked = list(corpus.documents(("traffic",), ("cpp",)))
    assert asked == [document for document in traffic if document[0] == "cpp"]


def test_long_docstrings_are_found_and_cut():
    prose = "A sentence of a docstring.  " * 12
    code = f'x = 1\ndef f():\n    """{prose}"""\n    return "{prose}"\n'
    source = code + f'add_newdoc("f", """{prose}""")\n'
    nodes = corpus.long_docstrings(source)
    assert sorted(node.lineno for node in nodes) == [3, 5]  # a plain string is code
    expected = f'x = 1\ndef f():\n    return "{prose}"\n\n'
    assert corpus.without_lines_of(source, nodes) == expected
    assert not corpus.long_docstrings('"""Too short."""')


def test_repeats_are_removed():
    seen = set()
    block = "".join(f"    a line of some length, number {i}\n" for i in range(5))
    assert corpus.without_repeats("first\n" + block, seen) == "first\n" + block
    assert corpus.without_repeats("second\n" + block + "third\n", seen) == "second\nthird\n"
    two = "    a line of some length, number 0\n    a line of some length, number 1\n"
    assert corpus.without_repeats("fourth\n" + two, seen) == "fourth\n" + two
    long = "x" * 60 + "\n"
    assert corpus.without_repeats(long + "fifth\n", seen) == long + "fifth\n"
    assert corpus.without_repeats("sixth\n" + long, seen) == "sixth\n"


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", corpus.CLASSES)
def test_prompts_start_at_a_line_and_do_not_repeat(kind, traffic, monkeypatch):
    """400 of each class, from this machine's traffic."""
    texts = [text for own, _, text in traffic if own == kind]
    monkeypatch.setattr(corpus, "texts_of", lambda *asked: texts)
    prompts = corpus.prompts_of(kind, "traffic", 400, seed=0)
    everything = "\n" + "\n".join(texts)
    owner = {}
    for i, prompt in enumerate(prompts):
        assert len(prompt) == 128 and prompt[0] != "\n" and "\n" + prompt in everything
        for j in range(128 - 64 + 1):
            assert owner.setdefault(prompt[j : j + 64], i) == i
    assert corpus.prompts_of(kind, "traffic", 12, seed=0) == prompts[:12]
    assert corpus.prompts_of(kind, "traffic", 12, seed=1) != prompts[:12]


@pytest.fixture
def made_up(monkeypatch):
    """A hundred files of a licence and a few lines of their own; records what is asked for."""
    licence = "Permission is granted, free of charge, to any person who obtains a copy of this.\n"
    asked = []

    def texts_of(kind, split):
        asked.append((kind, split))
        own = [f"{kind} {split} {i:04d} is a line of its own, and long.\n" for i in range(300)]
        return [licence + "\n" + "".join(own[i : i + 3]) for i in range(0, 300, 3)]

    monkeypatch.setattr(corpus, "texts_of", texts_of)
    return asked


def test_boilerplate_is_in_one_prompt_at_most(made_up):
    """Of a class and split only; a file gives its licence or one stretch of its own lines."""
    prompts = corpus.prompts_of("cpp", "traffic", 100, seed=3)
    assert made_up == [("cpp", "traffic")]
    assert sum("Permission" in prompt for prompt in prompts) <= 1
    assert all(prompt.startswith(("cpp traffic", "Permission")) for prompt in prompts)


def test_prompts_that_are_not_there_are_refused(made_up):
    with pytest.raises(UserError, match="unknown class of text 'rust': expected some of python"):
        corpus.prompts_of("rust", "traffic", 1, seed=0)
    with pytest.raises(UserError, match="holds 101 prompts of 128 .* not 102: ask for fewer"):
        corpus.prompts_of("docs", "eval", 102, seed=0)
    assert len(corpus.prompts_of("docs", "eval", 101, seed=0)) == 101
    with pytest.raises(UserError, match="holds 0 prompts of 5000 characters"):
        corpus.prompts_of("docs", "eval", 1, seed=0, length=5000)


# ---- batches -------------------------------------------------------------------------------------


def test_windows_and_samples_are_stretches_after_the_begin_token():
    stream = np.arange(100, dtype=np.uint8)
    rows = corpus.windows(stream, 4, 10)
    assert rows.shape == (4, 11) and (rows[:, 0] == 256).all()
    assert rows[:, 1].tolist() == [0, 30, 60, 90] and (rows[:, 1:].diff(dim=1) == 1).all()
    rows = corpus.sample([stream, stream + 100], 6, 10, np.random.default_rng(0))
    assert rows.shape == (6, 11) and (rows[:, 0] == 256).all()
    assert (rows[:, 1:].diff(dim=1) == 1).all()
    assert [row >= 100 for row in rows[:, 1].tolist()] == [False, True] * 3
