"""Our models as directories that transformers reads, and the benchmark against it."""

from pathlib import Path

import pytest
import torch

from bench import against_transformers
from formats import export, huggingface
from model import UserError
from support.store import load_target, save
from tests.test_formats import hf_model, refused
from tests.test_tokens import bpe
from tests.tiny import tiny_draft, tiny_target

pytest.importorskip("safetensors")
HOME = Path(__file__).parent.parent


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}), ("qwen2", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"qk_norm": True, "eos_token_ids": (3, 7)})])
@torch.no_grad()
def test_our_checkpoints_in_hugging_face_layout(tmp_path, kind, changes):
    """Same logits in transformers but for the suppressed ids; loaded back, the same to the bit."""
    transformers = pytest.importorskip("transformers")
    target, out = tiny_target(**changes), tmp_path / "out"
    save(tmp_path / "t.pt", target.config, target.state_dict(), {})
    export.main([f"{tmp_path}/t.pt", "--out", str(out)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(0, 16, (1, 60))
    own = target.logits(target(ids)[0])
    torch.testing.assert_close(theirs(ids).logits[..., :16], own[..., :16], atol=1e-4, rtol=0)
    back = huggingface.load_model(out, torch.float32)
    assert back.config == target.config and torch.equal(back.logits(back(ids)[0]), own)
    assert theirs.generation_config.suppress_tokens == [16] and theirs.config.model_type == kind
    with refused("exists: name a directory"):
        export.main([f"{tmp_path}/t.pt", "--out", str(out)])
    (tmp_path / "file").write_text("")
    with refused("cannot write"):
        export.main([f"{tmp_path}/t.pt", "--out", f"{tmp_path}/file/out"])


@torch.no_grad()
def test_the_embedded_target_says_the_same_from_a_directory(tmp_path):
    path = HOME / "weights/target.pt"
    export.main([str(path), "--out", f"{tmp_path}/out"])
    target, _ = load_target(path)
    back, tokenizer = huggingface.load_target(tmp_path / "out")
    ids = torch.tensor([tokenizer.encode("class Stack:\n    def push(self, item):\n")])
    assert ids[0, :3].tolist() == [256, *b"cl"] and back.config == target.config
    assert torch.equal(back.logits(back(ids)[0]), target.logits(target(ids)[0]))


def test_a_head_is_no_model_to_convert(tmp_path):
    head = tiny_draft(tiny_target())
    save(tmp_path / "d.pt", head.config, head.state_dict(), {})
    with refused("is a head, which says nothing without its target"):
        export.main([f"{tmp_path}/d.pt", "--out", f"{tmp_path}/out"])


# ---- the benchmark against transformers ----------------------------------------------------------


def test_the_benchmark_names_what_is_wrong_before_it_loads_anything(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for flags, message in (
        (["--prompts", f"{tmp_path}/none"], "cannot read .*none"),
        (["--prompts", f"{tmp_path}/empty"], "that is empty or no text, or none"),
        (["--turns", "0"], "--turns must be at least 1"),
        (["--num-speculative-tokens", "-1"], "--num-speculative-tokens must be"),
    ):
        with refused(message):
            against_transformers.main(["no/such/model", *flags])


@pytest.mark.parametrize("draft, arms", [("memory", 4), ("small", 4), ("head", 3)])
def test_all_arms_of_the_benchmark_say_the_same(tmp_path, capsys, draft, arms):
    pytest.importorskip("transformers")
    for name, layers in (("target", 8), ("small", 2)):
        hf_model(tmp_path / name, layers=layers, vocab_size=290)
        bpe(tmp_path / name)
    model = huggingface.load_model(tmp_path / "target", torch.float32)
    export.write_head(tiny_draft(model), tmp_path / "head", model)
    (tmp_path / "prompts").write_text("the quick brown fox jumps\nthe dog says hello, the dog\nno")
    name = draft if draft == "memory" else str(tmp_path / draft)
    against_transformers.main([
        f"{tmp_path}/target", "--draft", name, "--prompts", f"{tmp_path}/prompts",
        "--turns", "2", "--max-new-tokens", "7"])
    said = capsys.readouterr().out
    assert "answers differ in 0 turns" in said and said.count("tokens/s ") == arms
    with pytest.raises(UserError, match="no prompt of 9 tokens or more"):
        (tmp_path / "prompts").write_text("no")
        against_transformers.main([f"{tmp_path}/target", "--prompts", f"{tmp_path}/prompts"])
