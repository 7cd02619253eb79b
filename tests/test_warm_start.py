"""A head for anyone's checkpoint, in one command, on a tiny target."""

import json

import pytest
import torch

from formats import warm_start
from formats.find import find_draft, find_target
from generation import Generation, Request
from model import UserError
from support.draft_length import Plan
from support.trace import Trace

pytest.importorskip("safetensors")


def run(files, out, *more):
    prompts = files / "thirty.jsonl"
    lines = [{"prompt": f"prompt {i}" * (1 + i % 3), "class": "ab"[i % 2]} for i in range(60)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    warm_start.main(["--target", f"{files}/target.pt", "--prompts", str(prompts), "--out", str(out),
                     "--dtype", "float32", "--max-new-tokens", "16", "--rows", "16",
                     "--draft-vocab", "100", "--num-speculative-tokens", "3", "--minutes", "0.1",
                     *more])


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("warm") / "head"
    run(files, out)
    return out


def answers_in(work):
    stored = [torch.load(path, weights_only=True) for path in sorted(work.glob("answers-*.pt"))]
    return [Trace(**fields) for batch in stored for fields in batch]


def test_a_head_is_made_that_is_better_than_a_random_one(files, made):
    target, _ = find_target(f"{files}/target.pt", "float32")
    draft, _ = find_draft(str(made), target)
    record = json.loads((made / "record.json").read_text())
    assert len(draft.vocabulary) == 100 and record["chain"] == 3
    assert record["learned_from"]["answers"] == 54 and record["held_out"] == 6
    assert set(record["tokens_a_round"]) == {"a T=0", "a T=0.7", "b T=0", "b T=0.7"}
    torch.manual_seed(0)
    vocabulary, held_out = draft.vocabulary, answers_in(made.with_name("head.work"))[::5]
    pairs = [(warm_start.Question("all", True, [], 0.7, 0), trace) for trace in held_out]
    heads = draft, warm_start.Draft(target, vocabulary=vocabulary)
    learned, random = (warm_start.lengths(x, target.logits, pairs, 3)["all T=0.7"] for x in heads)
    assert learned > random + 0.1


def test_an_answer_is_what_the_target_says_alone(files, made):
    """Batched with others of other lengths, whatever order the batches are in."""
    target, _ = find_target(f"{files}/target.pt", "float32")
    traces = answers_in(made.with_name("head.work"))
    assert len(traces) == 60 and {t.temperature for t in traces} == {0.0, 0.7}
    for trace in [t for t in traces if t.temperature == 0][::6]:
        prompt = trace.ids[: trace.prompt_length].tolist()
        alone = Generation(target, None, [Request(prompt, 16, 0, 0.0)])
        while not alone.done:
            drafted = alone.draft_tokens(Plan())
            alone.commit(drafted, *alone.verify(drafted))
        assert alone.text[0] == trace.ids.tolist()
        torch.testing.assert_close(alone.trace().features, trace.features, atol=1e-3, rtol=1e-4)


def test_the_vocabulary_is_what_is_commonest(files, made):
    target, _ = find_target(f"{files}/target.pt", "float32")
    draft, _ = find_draft(str(made), target)
    found = answers_in(made.with_name("head.work"))
    count = torch.bincount(torch.cat([t.ids for t in found]), minlength=257)
    left_out = torch.ones(257, dtype=torch.bool).index_fill_(0, draft.vocabulary, False)
    left_out[256] = False  # the begin token is never said
    # the head's own counts leave out the six that were held out, of 22 tokens or more
    assert count[draft.vocabulary].sum() > 0.8 * count.sum()
    assert count[left_out].max() <= count[draft.vocabulary].median() + 10


def test_a_run_that_was_ended_goes_on_with_its_answers(files, made, tmp_path, capsys):
    work = made.with_name("head.work")
    files_before = sorted(work.glob("answers-*.pt"))
    files_before[1].unlink()
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("answers-*.pt")}
    made.rename(tmp_path / "elsewhere")
    run(files, made, "--minutes", "0.02")
    after = {path.name: path.stat().st_mtime_ns for path in work.glob("answers-*.pt")}
    assert len(after) == len(before) + 1
    assert all(after[name] == stamp for name, stamp in before.items())
    assert "answers of up to 16 tokens: about" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists: name a directory"):
        run(files, made)
    made.rename(tmp_path / "again")
    with pytest.raises(UserError, match="holds answers to other questions"):
        run(files, made, "--max-new-tokens", "15")


def test_what_cannot_be_made_is_one_line(files, tmp_path):
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match="3 prompts that fit are too few"):
        run(files, tmp_path / "head", "--prompts", f"{tmp_path}/few.txt")
    with pytest.raises(UserError, match="no chat template"):
        run(files, tmp_path / "head", "--chat")
