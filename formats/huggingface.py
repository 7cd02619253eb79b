"""Real checkpoints, in: Llama, Qwen2 and Qwen3 in Hugging Face layout, and EAGLE-3 heads for them.

    target, tokenizer = load_target("Qwen/Qwen3-0.6B")    a name on the hub, or a directory
    draft = load_draft(DIR, target)                       an EAGLE-3 head, or a small language model

The tensors decide what a model has (biases, q/k norms), config.json what they mean, and what is not
understood is refused by name.  Weights that are already in the dtype asked for are the mapped file
itself.  Heads are read as EAGLE-3's authors, SGLang and vLLM write them, and in the format of the
`speculators` library, which has other names for the same things.
"""

from dataclasses import replace

import torch

from draft import head_from
from formats.files import locate, read_json, read_tensors, shorten
from formats.pruned import from_offsets
from formats.small_model import SmallModel, same_vocabulary
from formats.tokens import Bytes, Tokenizer
from model import Config, Transformer, UserError, register_tables
from support.costs import bytes_free
from support.store import fill

SIZES = {  # what config.json must say, and the most that can be meant
    "vocab_size": 2**24, "hidden_size": 2**18, "intermediate_size": 2**20,
    "num_hidden_layers": 1024, "num_attention_heads": 2**12, "num_key_value_heads": 2**12,
    "head_dim": 2**12, "max_position_embeddings": 2**21,
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


# ---- config.json ---------------------------------------------------------------------------------


def whole(raw, name, low, high):
    value = raw.get(name)
    if type(value) is not int or not low <= value <= high:  # a bool is an int elsewhere
        raise UserError(
            f"{name} = {shorten(value)}, expected a whole number from {low} to {high}")
    return value


def real(raw, name, low, high, default=None):
    value = raw.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
        raise UserError(f"{name} = {shorten(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def ids_of(raw, name, V):
    """An id, a list of them, or nothing -> tuple"""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < V:
            raise UserError(f"{name} = {shorten(value)}, expected ids in 0..{V - 1}")
    return tuple(ids)


def understand(raw, generation, tensors):
    """config.json, generation_config.json and the tensors -> Config.  Raises UserError with the
    reason why this model cannot be run here; Python's own errors mean a value of a wrong type."""
    kind = raw.get("model_type")
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if "moe" in str(kind) or any(raw.get(name) for name in experts):
        raise UserError(f"{shorten(kind)} is a mixture of experts, which is not supported")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(
            f"model_type {shorten(kind)} is not supported: expected llama, qwen2 or qwen3")
    plain = [t.is_floating_point() and t.element_size() > 1 for t in tensors.values()]
    if not all(plain) or raw.get("quantization_config"):
        raise UserError("its weights are quantised, which is not supported")
    sliding = raw.get("use_sliding_window", raw.get("sliding_window") is not None)
    if sliding or any(layer != "full_attention" for layer in raw.get("layer_types") or ()):
        raise UserError("attention with a sliding window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {shorten(raw['hidden_act'])} is not supported: expected silu")

    sizes = dict(raw)
    if raw.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = raw.get("num_attention_heads")
    if raw.get("head_dim") is None:
        heads = whole(raw, "num_attention_heads", 1, SIZES["num_attention_heads"])
        sizes["head_dim"] = whole(raw, "hidden_size", 1, SIZES["hidden_size"]) // heads
    sizes = {name: whole(sizes, name, 1, most) for name, most in SIZES.items()}
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise UserError("its heads do not divide into groups, or their width into halves")
    tied = raw.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise UserError(f"tie_word_embeddings = {shorten(tied)}, expected true or false")

    V = sizes["vocab_size"]
    suppressed = ids_of(generation, "suppress_tokens", V)
    if len(set(suppressed)) == V:
        raise UserError("suppress_tokens names every id: nothing is left to say")
    both = [ids_of(x, "eos_token_id", V) for x in (generation, raw)]
    theta, scaling = rope(raw)
    return Config(
        **sizes, rope_theta=theta, rope_scaling=scaling, tie_word_embeddings=tied,
        rms_norm_eps=real(raw, "rms_norm_eps", 0, 1, 1e-6),
        attention_bias=any(name.endswith("q_proj.bias") for name in tensors),
        output_bias=any(name.endswith("o_proj.bias") for name in tensors),
        qk_norm=any(name.endswith("q_norm.weight") for name in tensors),
        bos_token_id=None if raw.get("bos_token_id") is None else whole(
            raw, "bos_token_id", 0, V - 1),
        suppress_tokens=suppressed, eos_token_ids=both[0] or both[1],
    )


def rope(raw):
    """-> rope_theta, rope_scaling; in the spelling of transformers 5 or 4."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    by_layer = any(isinstance(value, dict) for value in given.values())
    if kind not in ("default", "llama3") or by_layer:
        raise UserError(f"RoPE of type {shorten(kind)} is not supported: "
                        "expected default or llama3, the same in every layer")
    if given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) not in (1, None):
        raise UserError("RoPE over a part of the head is not supported")
    where = given if "rope_theta" in given else raw
    theta = real(where, "rope_theta", 1, 1e12, 10000.0)
    if kind == "default":
        return theta, None
    try:
        scaling = {name: real(given, name, 1e-6, 1e9) for name in LLAMA3}
    except UserError as error:
        raise UserError(f"RoPE of type llama3 needs {', '.join(LLAMA3)}: {error}") from None
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("RoPE of type llama3 needs low_freq_factor below high_freq_factor")
    return theta, {name: given[name] for name in LLAMA3}


def read_config(directory, raw, tensors):
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    try:
        return understand(raw, generation, tensors)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a text for an object ..
        kind, what = type(error).__name__, shorten(str(error))
        raise UserError(
            f"{directory}: config.json cannot be understood ({kind}: {what})") from None


# ---- whole models --------------------------------------------------------------------------------


def load_model(directory, dtype, kind=Transformer):
    """Built without memory, then filled with the mapped tensors themselves, or with conversions.
    dtype None: bfloat16 if that is what they are, else float32."""
    tensors = read_tensors(directory)
    config = read_config(directory, read_json(directory / "config.json"), tensors)
    embedding = tensors.get("model.embed_tokens.weight")
    tied = config.tie_word_embeddings and embedding is not None
    if tied and not torch.equal(tensors.pop("lm_head.weight", embedding), embedding):
        raise UserError(
            f"{directory}: tie_word_embeddings is set, but lm_head.weight is not the embedding")
    with torch.device("meta"):
        model = kind(config)
    if dtype is None:
        short = all(t.dtype == torch.bfloat16 for t in tensors.values())
        dtype = torch.bfloat16 if short else torch.float32
    check_memory(directory, tensors, dtype)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype)
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    fill(model, tensors, directory, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    register_tables(model, config)
    return model


def check_memory(directory, tensors, dtype):
    """Raises UserError where there is too little for the weights, before any of them is read."""
    needed, free = sum(t.numel() for t in tensors.values()) * dtype.itemsize, bytes_free()
    if free is not None and needed > free:
        raise UserError(f"{directory}: its weights take {needed / 1e9:.1f} GB in "
                        f"{str(dtype).removeprefix('torch.')}, and {free / 1e9:.1f} GB of memory "
                        "are free")


def load_target(name, dtype=torch.float32):
    """-> (Transformer, tokenizer); a byte-level target that was exported has bytes here too."""
    directory = locate(name)
    target = load_model(directory, dtype)
    config = target.config
    byte_level = config.vocab_size == 257 and not (directory / "tokenizer.json").exists()
    return target, Bytes(config) if byte_level else Tokenizer(config, directory)


def load_draft(name, target):
    """An EAGLE-3 head for this target, or a small language model with its vocabulary; float32, as
    it is to learn."""
    directory = locate(name)
    raw = read_json(directory / "config.json")
    if "speculators_model_type" in raw:
        return load_eagle3(directory, of_speculators(directory, raw), target)
    if "Eagle3" in str(raw.get("architectures")):
        return load_eagle3(directory, raw, target)
    same_vocabulary(name, raw.get("vocab_size"), target)
    return load_model(directory, torch.float32, SmallModel)


# ---- EAGLE-3 heads -------------------------------------------------------------------------------


def of_speculators(directory, raw):
    """A config.json of the speculators library -> the same in EAGLE-3's layout.  There, a head is
    taken to normalise before its residual unless it says that it does not."""
    kind, layer = raw["speculators_model_type"], raw.get("transformer_layer_config")
    if kind != "eagle3" or not isinstance(layer, dict):
        raise UserError(f"{directory}: a speculator of type {shorten(kind)} is not supported: "
                        "expected eagle3, with a transformer_layer_config")
    rest = {name: value for name, value in raw.items() if name != "transformer_layer_config"}
    return {"model_type": "llama", "norm_before_residual": True} | layer | rest


def layers_read(raw, inner, target):
    """Which layers' inputs a head reads.  SGLang's eagle_config counts layers by their outputs."""
    ids, offset = raw.get("eagle_aux_hidden_state_layer_ids"), 0
    if ids is None:
        ids, offset = inner.get("eagle_aux_hidden_state_layer_ids"), 1
    if ids is None:
        return target.feature_layers
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        return ids  # which is none that can be right
    return tuple(i + offset for i in ids)


def check_head(directory, raw, config, weights, vocabulary, target):
    """Raises UserError, with the reason why a head is none for this target or none that is read
    here.  Nothing has been built from its sizes yet."""
    inner = raw.get("eagle_config") or {}
    if not isinstance(inner, dict):
        raise UserError(f"{directory}: eagle_config = {shorten(inner)}, expected an object")
    D, V = target.config.hidden_size, target.config.vocab_size
    odd = config.attention_bias or config.output_bias or config.qk_norm
    size = V if vocabulary is None else len(vocabulary)
    wanted = [
        ("num_hidden_layers", config.num_hidden_layers, 1),
        ("target_hidden_size", raw.get("target_hidden_size") or D, D),
        ("draft_vocab_size", raw.get("draft_vocab_size") or size, size),
        ("layers read", layers_read(raw, inner, target), target.feature_layers),
        ("use_aux_hidden_state", inner.get("use_aux_hidden_state", True), True),
        ("having biases or q/k norms", odd, False),
    ]
    for name in ("norm_before_residual", "norm_before_fc", "norm_output", "fc_norm"):
        wanted.append((name, raw.get(name) or False, False))
    E = config.head_dim
    rows = {"mlp.gate": config.intermediate_size, "self_attn.q": config.num_attention_heads * E,
            "self_attn.k": config.num_key_value_heads * E}
    for name, expected in rows.items():
        weight = weights.get(f"midlayer.{name}_proj.weight", torch.empty(expected))
        wanted.append((f"rows of {name}_proj", weight.shape[:1].numel(), expected))
    for what, found, expected in wanted:
        if found != expected:
            found = shorten(found)
            raise UserError(f"{directory}: {what} is {found}, expected {expected} for this target")


def load_eagle3(directory, raw, target):
    """A head whose config.json is `raw` -> Draft.  Without an lm_head of its own it has the
    target's."""
    named = read_tensors(directory)
    weights = {n.replace("layers.0.", "midlayer.", 1): t for n, t in named.items()}
    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    config, own = read_config(directory, raw, weights), target.config
    same_vocabulary(directory, config.vocab_size, target)
    vocabulary = from_offsets(d2t, t2d, own.vocab_size, directory)
    check_head(directory, raw, config, weights, vocabulary, target)
    config = replace(
        config, tie_word_embeddings=False, bos_token_id=own.bos_token_id,
        eos_token_ids=own.eos_token_ids, suppress_tokens=own.suppress_tokens)
    weights = {name: t.float() for name, t in weights.items()}
    if "lm_head.weight" not in weights:
        head = target.lm_head.weight.detach().float()
        weights["lm_head.weight"] = head if vocabulary is None else head[vocabulary]
    if vocabulary is not None:
        weights["vocabulary"] = vocabulary
    return head_from(weights, config, target, directory)
