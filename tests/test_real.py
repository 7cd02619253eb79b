"""SmolLM2-135M-Instruct itself, wherever `python -m bench.smollm2 --fetch` has put it."""

import json

import pytest
import torch

import aurora
from bench import smollm2
from formats.find import find_draft, find_target
from generation import Request
from model import UserError
from support import options
from support.chat_traffic import user_says
from support.draft_length import FixedLength

pytestmark = pytest.mark.real
QUESTION = "What is a list in Python? Give an example."


@pytest.fixture(scope="module")
def directory():
    if not (smollm2.MODEL / "config.json").exists():
        pytest.skip(f"no model in {smollm2.MODEL}: python -m bench.smollm2 --fetch")
    pytest.importorskip("safetensors")
    return smollm2.MODEL


@pytest.fixture(scope="module")
def model(directory):
    return find_target(str(directory), "float32")


@torch.no_grad()
def test_logits_and_chat_template_are_those_of_transformers(directory, model):
    transformers = pytest.importorskip("transformers")
    target, tokenizer = model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    template = transformers.AutoTokenizer.from_pretrained(directory).apply_chat_template
    ids = options.encode(user_says(QUESTION), tokenizer)
    assert template(user_says(QUESTION), add_generation_prompt=True)["input_ids"] == ids
    ids = torch.tensor([ids])
    own = target.logits(target(ids)[0])
    torch.testing.assert_close(own, theirs(ids).logits, atol=1e-3, rtol=0)  # of up to 40


def test_the_shipped_head_changes_no_answer_and_is_accepted(model):
    if not smollm2.HEAD.exists():
        pytest.skip("no head is shipped for it")
    target, tokenizer = model
    draft, _ = find_draft(str(smollm2.HEAD), target)
    request = Request(options.encode(user_says(QUESTION), tokenizer), 40, 0, 0.0)
    plain = aurora.Arm().serve(target, request).generation
    drafted = aurora.Arm(draft, FixedLength(3)).serve(target, request).generation
    assert drafted.answer() == plain.answer()
    assert len(drafted.rounds[0]) < 0.8 * len(plain.rounds[0])


def test_the_record_of_the_shipped_head():
    if not smollm2.HEAD.exists():
        pytest.skip("no head is shipped for it")
    record = json.loads((smollm2.HEAD / "record.json").read_text())
    assert min(record["tokens_a_round"].values()) > 1 and record["chain"] == 5
    assert sum(file.stat().st_size for file in smollm2.HEAD.iterdir()) < 25e6


def test_the_command_line_answers_a_chat(directory, capsys):
    aurora.main(["--target", str(directory), "--draft", "none", "--memory", "off", "--chat",
                 "--prompt", QUESTION, "--max-new-tokens", "24", "--temperature", "0"])
    assert "list" in capsys.readouterr().out


def test_a_context_longer_than_the_model_s_is_one_line(directory):
    with pytest.raises(UserError, match="do not fit into the context of 8192"):
        aurora.main(["--target", str(directory), "--draft", "none", "--prompt", "Hello there",
                     "--max-new-tokens", "8192"])
