"""Checkpoints of others as targets: what is read computes what transformers computes, and what
cannot be read is refused in one line.  Models are tiny and random."""

import gc
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from formats import files, huggingface
from model import UserError, by_columns

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
KINDS = {  # what to build with transformers: the class, and what differs from SIZES
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama biased": ("Llama", {"attention_bias": True}),
    "llama 3": ("Llama", {"head_dim": 16, "eos_token_id": [3, 5],  # some frequencies blend
                          "rope_parameters": LLAMA3 | {"rope_theta": 1e3}}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": True}),
}
SIZES = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
         "eos_token_id": None, "pad_token_id": 0}


def hf_model(folder, kind="qwen3", seed=0, layers=8, **changes):
    """A random model, its biases and norms random too, saved by transformers; odd seeds shard."""
    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        **SIZES | {"num_hidden_layers": layers} | more | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 else p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape) * scale + ("norm" in n and "bias" not in n))
    model.eval().save_pretrained(folder, max_shard_size="20KB" if seed % 2 else "1GB")
    return model


def edit(path, **changes):
    """Changes fields of a .json file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@contextmanager
def refused(match):
    """The block ends in a UserError of one readable line."""
    with pytest.raises(UserError, match=match) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and len(text) < 400


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A whole directory of two layers, to be copied and broken."""
    folder = tmp_path_factory.mktemp("whole")
    hf_model(folder, layers=2)
    return folder


@pytest.fixture
def copy(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "copy"))


def load(folder, dtype=torch.float32):
    return huggingface.load_model(folder, dtype)


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, kind):
    """Whole, through the cache in blocks, in bfloat16, and laid out by columns; sharded and not."""
    seed = list(KINDS).index(kind)
    theirs, ours = hf_model(tmp_path, kind, seed=seed), load(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (seed % 2 == 1)
    ids = torch.randint(211, (2, 150), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std() > 0.5, "logits that hardly differ show nothing"
    torch.testing.assert_close(ours.logits(ours(ids)[0]), expected, atol=1e-4, rtol=0)
    by_columns(ours)
    cache, got, at = ours.new_cache(2, 150), [], 0
    for width in (140, 1, 1, 5, 3):
        positions = torch.arange(at, at + width).expand(2, -1)
        got.append(ours(ids[:, at : at + width], positions, cache)[0])
        at += width
    got = ours.logits(torch.cat(got, dim=1))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    half = load(tmp_path, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half.logits(half(ids)[0]).float() - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("kind", ["llama 3", "qwen3"])
def test_both_spellings_of_rope_and_of_eos(tmp_path, kind):
    hf_model(tmp_path, kind, layers=2)
    config, new = tmp_path / "config.json", load(tmp_path).config
    given = json.loads(config.read_text())["rope_parameters"]
    theta = given.pop("rope_theta")
    assert new.rope_theta == theta and (new.rope_scaling is not None) == (kind == "llama 3")
    for name in ("rope_type", "type"):
        scaling = {name if k == "rope_type" else k: v for k, v in given.items()}
        scaling = scaling if kind == "llama 3" else None
        edit(config, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
        assert load(tmp_path).config == new
    (tmp_path / "generation_config.json").unlink()
    for eos, expected in ((7, (7,)), ([7, 9], (7, 9)), (None, ())):
        edit(config, eos_token_id=eos)
        assert load(tmp_path).config.eos_token_ids == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3]}')
    edit(config, eos_token_id=7)
    assert load(tmp_path).config.eos_token_ids == (3,), "generation's own comes first"


@pytest.mark.parametrize("kind", ["llama 3", "qwen3 tied"])
def test_weights_are_mapped_not_copied(tmp_path, kind):
    """In the dtype of the file every parameter is the mapped file itself; in another none is, and
    nothing keeps the mapping alive.  Tied heads are one tensor in both."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("mappings are read in /proc")
    hf_model(tmp_path, kind, layers=2).to(torch.bfloat16).save_pretrained(tmp_path)

    def mappings():
        lines = Path("/proc/self/maps").read_text().splitlines()
        ends = [x.split()[0].split("-") for x in lines if x.endswith(f"{tmp_path}/{WEIGHTS}")]
        return [range(int(low, 16), int(high, 16)) for low, high in ends]

    for dtype, mapped in ((torch.bfloat16, True), (torch.float32, False)):
        model = load(tmp_path, dtype)
        gc.collect()
        here = mappings()
        assert bool(here) == mapped
        for p in model.parameters():
            assert any(p.data_ptr() in r for r in here) == mapped and p.dtype == dtype
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == ("tied" in kind)
        del model, p


# ---- what is refused -----------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
NAN = float("nan")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
REFUSED = [  # what the message says, changes of config.json
    ("mixture of experts", {"model_type": "qwen3_moe"}),
    ("mixture of experts", {"num_experts": 8}),
    ("'mistral' is not supported", {"model_type": "mistral"}),
    ("model_type .* is not supported", {"model_type": ["llama"]}),
    ("sliding window", {"use_sliding_window": True, "sliding_window": 64}),
    ("sliding window", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("quantised", {"quantization_config": {"quant_method": "fp8"}}),
    ("'yarn' is not supported", {"rope_parameters": YARN}),
    ("'linear' is not", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}),
    ("llama3 needs factor", {"rope_parameters": LLAMA3 | {"factor": 0}}),
    ("llama3 needs factor", {"rope_parameters": LLAMA3 | {"factor": True}}),
    ("llama3 needs factor", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
    ("below high_freq_factor", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}),
    ("part of the head", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("same in every layer", {"rope_parameters": {"full": {"rope_type": "default"}}}),
    ("hidden_act 'gelu'", {"hidden_act": "gelu"}),
    ("do not divide", {"num_key_value_heads": 3}),
    ("into halves", {"head_dim": 15}),
    ("num_hidden_layers = '2'", {"num_hidden_layers": "2"}),
    ("num_hidden_layers = True", {"num_hidden_layers": True}),
    ("num_hidden_layers = 1000000000", {"num_hidden_layers": 10**9}),
    ("num_hidden_layers = 2.0", {"num_hidden_layers": 2.0}),
    ("num_key_value_heads = 0", {"num_key_value_heads": 0}),
    ("num_attention_heads = 0", {"num_attention_heads": 0, "head_dim": None}),
    ("vocab_size = None", {"vocab_size": None}),
    ("max_position_embeddings = -1", {"max_position_embeddings": -1}),
    ("max_position_embeddings = 1000", {"max_position_embeddings": 10**300}),
    ("bos_token_id = 211", {"bos_token_id": 211}),
    ("bos_token_id = False", {"bos_token_id": False}),
    ("eos_token_id = '</s>'", {"eos_token_id": "</s>"}),
    ("eos_token_id = .1, 211.", {"eos_token_id": [1, 211]}),
    ("eos_token_id = ..2..", {"eos_token_id": [[2]]}),
    ("rms_norm_eps = -1", {"rms_norm_eps": -1}),
    ("tie_word_embeddings = 'no'", {"tie_word_embeddings": "no"}),
    ("cannot be understood .AttributeError", {"rope_parameters": "default"}),
    ("cannot be understood .TypeError", {"layer_types": 3}),
    ("missing", {"num_hidden_layers": 3}),
    ("not known to this model", {"num_hidden_layers": 1}),
    ("has shape", {"intermediate_size": 64}),
    ("is not the embedding", {"tie_word_embeddings": True}),
    *[("rope_theta = ", {"rope_parameters": {"rope_theta": x}}) for x in (0, NAN, "1", [1], 1e300)],
]


@pytest.mark.parametrize("message, changes", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(copy, message, changes):
    edit(copy / "config.json", **changes)
    with refused(message):
        load(copy)


@pytest.mark.parametrize("suppress", [[211], [-1], ["1"], [True], "all", [None], list(range(211))])
def test_suppressed_ids_are_ids_and_not_all(copy, suppress):
    path = copy / "generation_config.json"
    edit(path, suppress_tokens=[5, 7])
    logits = load(copy).logits(torch.ones(1, 32))
    assert logits.isneginf().nonzero()[:, 1].tolist() == [5, 7]
    edit(path, suppress_tokens=suppress)
    with refused("suppress_tokens"):
        load(copy)


@pytest.mark.parametrize("text", [b"{", b"[]", b"7", b"\xff", b'{"a":' * 100_000, b""])
def test_what_is_no_json_object_is_refused(copy, text):
    (copy / "config.json").write_bytes(text)
    with refused("expected a JSON object"):
        load(copy)


def test_weights_that_are_no_such_weights_are_refused(copy):
    from safetensors.torch import load_file, save_file

    file, norm = copy / WEIGHTS, "model.norm.weight"
    whole, given = file.read_bytes(), load_file(copy / WEIGHTS)
    for changed, message in (
        ({norm: given[norm] * NAN}, "NaN"), ({norm: given[norm].double() * 1e300}, "infinity"),
        ({"model.norm.bias": given[norm].clone()}, "not known"),
        ({norm: given[norm].to(torch.float8_e4m3fn)}, "quantised"),
        ({norm: given[norm].int()}, "quantised"), ({norm: given[norm][:3].clone()}, "has shape"),
        ({norm: torch.ones(32, 1)}, "has shape"),
    ):
        save_file(given | changed, copy / "other")
        (copy / "other").replace(file)  # a mapped file is never written over
        with refused(message):
            load(copy)
    for content in (whole[:-100], whole[:5], b"", b"PK\x03\x04" * 100, b"\xff" * 64):
        file.unlink()
        file.write_bytes(content)
        with refused("not a whole safetensors file"):
            load(copy)
    file.unlink()
    with refused("no model.safetensors$"):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with refused("pickles are never read"):
        load(copy)


@pytest.mark.parametrize("where", [
    [], {}, "a", 3, {"a": 1}, {"a": ["b"]}, {"a": {"b": "c"}}, {"a": "../model.safetensors"},
    {"a": ".."}, {"a": "/etc/passwd"}, {"a": "x\0.safetensors"}, {"a": ""}, None])
def test_an_index_leads_to_files_beside_it(copy, where):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with refused("weight_map"):
        load(copy)
    shutil.copy(copy / WEIGHTS, copy / "b.safetensors")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": WEIGHTS, "b": "b.safetensors"}}))
    with refused("stands in two files"):
        load(copy)


def test_missing_extras_and_unreachable_names_are_one_line(small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with refused("needs safetensors: pip install -r requirements-hf.txt"):
            load(small)
        patch.setitem(sys.modules, "huggingface_hub", None)
        with refused("no/such is no directory here.*pip install"):
            huggingface.load_target("no/such")
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with refused("no/such is no directory here and could not be fetched.*no network"):
        huggingface.load_target("no/such")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(small))
    assert files.locate("some/name") == small
