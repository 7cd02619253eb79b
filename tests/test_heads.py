"""EAGLE-3 heads, in and out, as SGLang and vLLM read them; pruned vocabularies."""

import json
from dataclasses import replace

import pytest
import torch

from draft import Draft, head_config
from formats import export, huggingface
from formats.pruned import from_offsets, common_ids, to_offsets
from support.draft_length import FixedLength
from tests.test_formats import edit, hf_model, refused
from tests.tiny import play, request, tiny_target

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

PRUNED = torch.arange(1, 211, 3)  # every third id: its offsets, 1 3 5 .., could be ids


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A random Llama of transformers, with eight layers and stretched RoPE."""
    folder = tmp_path_factory.mktemp("target")
    hf_model(folder, "llama 3")
    return huggingface.load_model(folder, torch.float32).eval()


def head(target, vocabulary=None):
    """Sizes of its own, and weights that are nobody's copy."""
    torch.manual_seed(3)
    config = replace(head_config(target.config), intermediate_size=40, num_attention_heads=4,
                     num_key_value_heads=1, max_position_embeddings=300)
    draft = Draft(target, config, vocabulary)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return draft.eval()


def exported(draft, target, folder):
    export.export_draft(draft, folder, "scratch", 0.8, target)
    return folder, load_file(folder / "model.safetensors")


def same_drafts(one, other, target):
    """They propose the same tokens from the same logits, bit for bit."""
    ask = request(length=12, new=24, temperature=0.8)
    rounds = [play(target, draft, [ask], FixedLength(3))[1] for draft in (one, other)]
    assert len(rounds[0]) == len(rounds[1]) > 4
    for a, b in zip(*rounds):
        assert torch.equal(a.tokens, b.tokens)
        if a.tokens.shape[1]:
            assert torch.equal(a.logits, b.logits)


# ---- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vocabulary", [None, PRUNED, torch.arange(211)], ids=["full", "pruned", "all"])
def test_an_exported_head_is_an_eagle3_directory(target, tmp_path, vocabulary):
    """Snapshot: keys, shapes, dtypes, fields; d2t and t2d only where ids are missing.  Loaded back,
    it drafts the same."""
    draft = head(target, vocabulary)
    folder, tensors = exported(draft, target, tmp_path / "out")
    there = sorted(path.name for path in tmp_path.rglob("*"))
    assert there == ["config.json", "model.safetensors", "out"]
    pruned = vocabulary is not None and len(vocabulary) < 211
    V, D, M, H, G = len(PRUNED) if pruned else 211, 32, 40, 4 * 16, 16
    layer = {
        "hidden_norm": (D,), "input_layernorm": (D,), "post_attention_layernorm": (D,),
        "self_attn.q_proj": (H, 2 * D), "self_attn.k_proj": (G, 2 * D),
        "self_attn.v_proj": (G, 2 * D), "self_attn.o_proj": (D, H),
        "mlp.gate_proj": (M, D), "mlp.up_proj": (M, D), "mlp.down_proj": (D, M)}
    shapes = {f"midlayer.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (V, D)}
    wanted = {name: (shape, torch.float32) for name, shape in shapes.items()}
    if pruned:
        wanted |= {"d2t": ((V,), torch.int64), "t2d": ((211,), torch.bool)}
        assert torch.equal(torch.arange(V) + tensors["d2t"], PRUNED)
        assert torch.equal(tensors["t2d"].nonzero()[:, 0], PRUNED)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == wanted
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_scaling": scaling, "rope_theta": 1e3,
        "torch_dtype": "float32", "eos_token_id": [3, 5], "bos_token_id": 1, "vocab_size": 211,
        "draft_vocab_size": V, "hidden_size": D, "intermediate_size": M, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 300, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    back = huggingface.load_draft(folder, target)
    assert back.config == draft.config and (back.vocabulary is not None) == pruned
    same_drafts(draft, back, target)


@pytest.mark.parametrize("origin", ["a copy", "rounded", "learned", "pruned"])
def test_no_exported_lm_head_is_the_targets(target, tmp_path, origin):
    """In any dtype that an engine serves in.  One that is nowhere near it is written as it is; else
    one number moves, by less than 1/128 of itself."""
    draft = head(target, PRUNED if origin == "pruned" else None)
    given, other = draft.lm_head.weight.data, target.lm_head.weight.detach()
    if origin in ("a copy", "rounded"):
        given.copy_(other if origin == "a copy" else other.bfloat16())
    written = exported(draft, target, tmp_path / "out")[1]["lm_head.weight"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not torch.equal(written.to(dtype), other.to(dtype))
    moved = written != given
    assert moved.sum() == (origin in ("a copy", "rounded"))
    assert ((written - given).abs() <= given.abs() / 128).all()


def test_how_to_serve_is_printed(target, tmp_path):
    """Engines draft greedily and verify token by token unless they are told not to."""
    draft = head(target)
    for temperature, sampled in ((0.8, {"draft_sample_method": "probabilistic"}), (0.0, {})):
        out = tmp_path / str(temperature)
        said = export.export_draft(draft, out, "scratch", temperature, target, K=4)
        assert f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {out} " in said
        assert "-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5" in said
        flags = json.loads(said.split("--speculative-config '")[1].rstrip("'"))
        assert flags == {"method": "eagle3", "model": str(out), "num_speculative_tokens": 4,
                         "rejection_sample_method": "block"} | sampled


def to_speculators(folder, **changes):
    """Rewrites a directory as the speculators library would have written it."""
    raw = json.loads((folder / "config.json").read_text())
    top = {"draft_vocab_size": raw.pop("draft_vocab_size"), "norm_before_residual": False,
           "eagle_aux_hidden_state_layer_ids": raw.pop("eagle_aux_hidden_state_layer_ids"),
           "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
           "target_hidden_size": None, "speculators_config": {"algorithm": "eagle3"}}
    del raw["architectures"]
    raw = top | {"transformer_layer_config": raw} | changes
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    names = {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()}
    save_file(names, folder / "model.safetensors")


@pytest.mark.parametrize("vocabulary", [None, PRUNED], ids=["full", "pruned"])
def test_a_head_in_the_speculators_format_is_the_same_head(target, tmp_path, vocabulary):
    draft = head(target, vocabulary)
    folder, tensors = exported(draft, target, tmp_path / "out")
    tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors")
    to_speculators(folder)
    same_drafts(draft, huggingface.load_draft(folder, target), target)
    for changes, message in (
        ({"norm_before_residual": True}, "norm_before_residual is True"),
        ({"norm_before_residual": None}, "norm_before_residual is True"),  # its library's default
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"transformer_layer_config": []}, "with a transformer_layer_config"),
        ({"speculators_model_type": "dflash"}, "type 'dflash' is not supported"),
    ):
        before = (folder / "config.json").read_text()
        edit(folder / "config.json", **changes)
        with refused(message):
            huggingface.load_draft(folder, target)
        (folder / "config.json").write_text(before)


@pytest.mark.parametrize("fields, fine", [
    ({"eagle_aux_hidden_state_layer_ids": None}, True),
    ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, False),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}, True),  # by outputs
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}}, False),
    ({"eagle_config": {"use_aux_hidden_state": False}}, False),
    ({"eagle_config": [1]}, False), ({"eagle_aux_hidden_state_layer_ids": 2}, False),
    ({"eagle_aux_hidden_state_layer_ids": [2, "4", 5]}, False),
    ({"eagle_aux_hidden_state_layer_ids": {"2": 4}}, False),
    ({"eagle_aux_hidden_state_layer_ids": [2.0, 4, 5]}, False)])
def test_which_layers_a_head_reads(target, tmp_path, fields, fine):
    folder, _ = exported(head(target), target, tmp_path / "out")
    if "eagle_config" in fields:
        fields = fields | {"eagle_aux_hidden_state_layer_ids": None}
    edit(folder / "config.json", **fields)
    if fine:
        huggingface.load_draft(folder, target)
    else:
        with refused("layers read|use_aux_hidden_state|eagle_config"):
            huggingface.load_draft(folder, target)


WRONG = [  # what the message says, changes of the fields, changes of the tensors (None removes)
    ("num_hidden_layers is 2", {"num_hidden_layers": 2}, {}),
    ("draft's vocabulary is 17", {"vocab_size": 17}, {}),
    ("hidden_size is 64, not 32", {"hidden_size": 64}, {}),
    ("target_hidden_size is 64", {"target_hidden_size": 64}, {}),
    ("draft_vocab_size is 69", {"draft_vocab_size": 69}, {}),
    ("norm_before_residual is True", {"norm_before_residual": True}, {}),
    ("rows of mlp.gate_proj is 40, expected 1000000", {"intermediate_size": 10**6}, {}),
    ("rows of self_attn.q_proj is 64", {"num_attention_heads": 4096}, {}),
    ("having biases", {}, {"midlayer.self_attn.q_proj.bias": torch.zeros(64)}),
    ("fc.weight is missing", {}, {"fc.weight": None}),
    ("lm_head.weight has shape", {}, {"lm_head.weight": torch.zeros(50, 32)}),
    ("own; only the target's is supported", {}, {"embed_tokens.weight": torch.zeros(211, 32)}),
    ("own; only the target's is supported", {}, {"embed_tokens.weight": torch.zeros(3)}),
    ("holds NaN", {}, {"norm.weight": torch.full((32,), float("nan"))}),
    ("not known", {}, {"input_norm.weight": torch.ones(96)}),
    ("quantised", {}, {"fc.weight": torch.zeros(32, 96, dtype=torch.int8)}),
    ("no t2d to tell", {}, {"t2d": None}),
    ("t2d without d2t", {}, {"d2t": None}),
    ("do not name the same", {}, {"t2d": torch.ones(211, dtype=torch.bool)}),
]


@pytest.mark.parametrize("message, fields, tensors", WRONG)
def test_heads_of_another_make_are_refused(target, tmp_path, message, fields, tensors):
    folder, given = exported(head(target, PRUNED), target, tmp_path / "out")
    edit(folder / "config.json", **fields)
    given = {name: t for name, t in (given | tensors).items() if t is not None}
    save_file(given, folder / "model.safetensors")
    with refused(message):
        huggingface.load_draft(folder, target)


def test_a_head_without_an_lm_head_has_the_targets_and_one_needs_seven_layers(target, tmp_path):
    for name, vocabulary in (("full", None), ("pruned", PRUNED)):
        folder, given = exported(head(target, vocabulary), target, tmp_path / name)
        del given["lm_head.weight"]
        save_file(given, folder / "model.safetensors")
        back = huggingface.load_draft(folder, target)
        whole = target.lm_head.weight
        assert torch.equal(back.lm_head.weight, whole if vocabulary is None else whole[PRUNED])
    short = tiny_target(num_hidden_layers=6, vocab_size=211, head_dim=16)
    edit(folder / "config.json", eagle_aux_hidden_state_layer_ids=None)
    with refused("only if L >= 7: this target has 6"):
        huggingface.load_draft(folder, short)


# ---- pruned vocabularies -------------------------------------------------------------------------


def test_offsets_lead_back_to_the_same_ids():
    for ids in ([0], [9], [0, 1, 2], [7, 8, 9], [0, 2, 4, 6, 8], [1, 2, 5, 9], range(9)):
        ids = torch.tensor([*ids])
        files = to_offsets(ids, 10)
        assert files["d2t"].dtype == torch.int64 and files["t2d"].sum() == len(ids)
        assert torch.equal(from_offsets(files["d2t"], files["t2d"], 10, "here"), ids)
    assert to_offsets(torch.arange(10), 10) == to_offsets(None, 10) == {}
    assert from_offsets(None, None, 10, "here") is None
    assert from_offsets(torch.zeros(10, dtype=torch.int64), None, 10, "here") is None
    neighbours = torch.tensor([0, 1, 1, 4], dtype=torch.int32)  # a t2d is not needed where two meet
    assert from_offsets(neighbours, None, 10, "here").tolist() == [0, 2, 3, 7]


@pytest.mark.parametrize("message, d2t", [
    ("d2t is torch.float32", torch.zeros(4)), ("d2t is torch.bool", torch.zeros(4).bool()),
    ("d2t has shape", torch.zeros(2, 2).long()), ("d2t has shape", torch.zeros(0).long()),
    ("d2t has shape", torch.zeros(11).long()), ("d2t has shape", torch.tensor(1)),
    ("ascending ids", torch.tensor([0, 1, 0])), ("ascending ids", torch.tensor([-1, 0])),
    ("ascending ids", torch.tensor([0, 9])), ("ascending ids", torch.tensor([2**63 - 1, 0])),
    ("ascending ids", torch.tensor([-(2**63), 0, 0])),
    ("ascending ids", torch.tensor([1, 4, 8])),  # ids, too large to be offsets
    ("ascending ids", torch.tensor([4, 2, 1])),  # ids in an order of their own
    ("no t2d to tell", torch.tensor([0, 1, 2, 3])), ("no t2d to tell", torch.tensor([3]))])
def test_a_d2t_that_holds_no_offsets_is_refused(message, d2t):
    with refused(message):
        from_offsets(d2t, None, 10, "here")


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [1, 2], [0, 2, 4], [3, 4]])
def test_ids_in_place_of_offsets_are_told_by_t2d(ids):
    ids, known = torch.tensor(ids), torch.zeros(10, dtype=torch.bool)
    known[ids] = True
    with refused("do not name the same ids"):
        from_offsets(ids, known, 10, "here")
    for t2d in (known.float(), known[:9], known[None]):
        with refused("t2d is"):
            from_offsets(ids - torch.arange(len(ids)), t2d, 10, "here")


def test_the_common_ids_are_those_that_may_be_said_and_the_ends(target):
    config = replace(target.config, vocab_size=10, eos_token_ids=(8, 1), suppress_tokens=(0, 3, 1))
    assert common_ids(config, 4).tolist() == [2, 4, 5, 8]
    assert common_ids(config, 1).tolist() == [8]
    assert common_ids(config, 7).tolist() == [2, 4, 5, 6, 7, 8, 9]
    for N in (8, 0, -1):
        with refused("says only 7 ids"):
            common_ids(config, N)
