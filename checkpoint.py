"""Real checkpoints: Llama, Qwen2 and Qwen3 in Hugging Face layout, EAGLE-3 heads, their tokenizers; in and out.

    python aurora.py --target Qwen/Qwen3-0.6B --draft ngram --prompt "..."     a name on the hub, or a directory
    python checkpoint.py weights/target.pt --out DIR          a checkpoint of this project in Hugging Face layout
    python checkpoint.py DIR --bench --draft DIR              ours against transformers', side by side

Weights are safetensors, memory-mapped: what is already in the dtype asked for is never copied.  No pickle is read and no
code of a checkpoint is run.  The tensors decide what a model has (biases, q/k norms), config.json what they mean, and what
is not understood is refused by name.  The extras (requirements-hf.txt) are imported here, and only when needed.
"""

import argparse
import importlib
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from draft import Draft, NGram, SmallModel, fill_draft
from model import Bytes, Config, Transformer, UserError, add_tables, fill
from model import load_target as load_ours

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def need(module, what="this checkpoint"):
    """An optional extra, or one line that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        where = "requirements-test.txt" if module == "transformers" else "requirements-hf.txt"
        raise UserError(f"{what} needs {module.split('.')[0]}: pip install -r {where}") from None


def locate(name):
    """A directory as it is; any other name is fetched from the hub, or found where it was fetched before."""
    if Path(name).is_dir():
        return Path(name)
    hub = need("huggingface_hub", f"{name} is no directory here, and fetching it from the hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]))
    except Exception as error:  # a dozen kinds: offline, no such name, no permission
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{name} is no directory here and could not be fetched from the hub ({type(error).__name__}: {reason})") from None


def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'expected a JSON object'}") from None


# ---- in ------------------------------------------------------------------------------------------------


def read_tensors(directory):
    """-> {name: tensor}, views of the mapped files: nothing is read before it is used."""
    index = directory / "model.safetensors.index.json"
    files = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    tensors, safe_open = {}, need("safetensors").safe_open
    for name in files:
        path = directory / name
        if Path(name).name != name or not path.is_file():
            pickles = " (pickles are never read: convert them to safetensors)" if list(directory.glob("*.bin")) else ""
            raise UserError(f"{directory}: no {name}{pickles}")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:  # a truncated or foreign file
            raise UserError(f"{path} is not a whole safetensors file ({type(error).__name__})") from None
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # old files keep that table


def read_config(directory, raw, tensors):
    """config.json -> Config, or the reason why this model cannot be run here."""
    try:
        return understand(directory, raw, tensors)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a text where a number belongs, and the like
        raise UserError(f"{directory}: config.json cannot be understood ({type(error).__name__}: {error})") from None


def understand(directory, raw, tensors):
    def refuse(reason):
        raise UserError(f"{directory}: {reason}")

    kind = raw.get("model_type")
    if "moe" in str(kind) or any(raw.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts")):
        refuse(f"{kind} is a mixture of experts, which is not supported")
    if kind not in ("llama", "qwen2", "qwen3"):
        refuse(f"model_type {kind!r} is not supported: expected llama, qwen2 or qwen3")
    odd = [t for n, t in tensors.items() if n not in ("d2t", "t2d") and (t.element_size() < 2 or not t.is_floating_point())]
    if odd or raw.get("quantization_config"):
        refuse("its weights are quantised, which is not supported")
    sliding = raw.get("use_sliding_window", raw.get("sliding_window") is not None)
    if sliding or any(layer != "full_attention" for layer in raw.get("layer_types") or ()):
        refuse("attention with a sliding window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r} is not supported: expected silu")
    raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
    raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    for name in SIZES:
        if type(raw.get(name)) is not int or raw[name] < 1:
            refuse(f"config.json has {name} = {raw.get(name)!r}, expected a positive whole number")

    if raw["num_attention_heads"] % raw["num_key_value_heads"] or raw["head_dim"] % 2:
        refuse("its heads do not divide into groups, or their width into halves")

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 and 4
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()):
        refuse(f"RoPE of type {rope_type!r} is not supported: expected default or llama3, the same in every layer")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) not in (1, None):
        refuse("RoPE over a part of the head is not supported")
    if rope_type == "llama3" and not all(isinstance(rope.get(k), (int, float)) and rope[k] > 0 for k in LLAMA3):
        refuse(f"RoPE of type llama3 needs {', '.join(LLAMA3)}")

    generation = directory / "generation_config.json"
    generation = read_json(generation) if generation.exists() else {}
    eos = raw.get("eos_token_id") if generation.get("eos_token_id") is None else generation["eos_token_id"]
    some_layer = lambda suffix: any(name.endswith(suffix) for name in tensors)
    return Config(
        **{name: raw[name] for name in SIZES},
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope_scaling={k: rope[k] for k in LLAMA3} if rope_type == "llama3" else None,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=some_layer("q_proj.bias"), output_bias=some_layer("o_proj.bias"), qk_norm=some_layer("q_norm.weight"),
        suppress_tokens=tuple(generation.get("suppress_tokens") or ()), bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None))


def load_model(directory, dtype, kind=Transformer):
    """Built without memory, then filled with the mapped tensors themselves, or with their conversions, made one by one."""
    tensors = read_tensors(directory)
    config = read_config(directory, read_json(directory / "config.json"), tensors)
    embedding = tensors.get("model.embed_tokens.weight")
    tied = config.tie_word_embeddings and embedding is not None
    if tied and not torch.equal(tensors.pop("lm_head.weight", embedding), embedding):
        raise UserError(f"{directory}: tie_word_embeddings is set, but lm_head.weight is not the embedding")
    with torch.device("meta"):
        model = kind(config)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype)
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    fill(model, tensors, directory, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    add_tables(model, config)
    return model


def load_target(name, dtype=torch.float32):
    """-> (Transformer, Tokenizer); the exported embedded target has bytes for tokens here too."""
    directory = locate(name)
    target = load_model(directory, dtype)
    byte_level = target.config.vocab_size == 257 and not (directory / "tokenizer.json").exists()
    return target, Bytes(target.config) if byte_level else Tokenizer(target.config, directory)


def load_draft(name, target):
    """An EAGLE-3 head for this target, or a small language model with its vocabulary; float32, as it is to learn."""
    directory = locate(name)
    raw = read_json(directory / "config.json")
    if raw.get("vocab_size") != target.config.vocab_size:
        raise UserError(f"{name}: the draft's vocabulary is {raw.get('vocab_size')}, the target's {target.config.vocab_size}: "
                        "they must be the same")
    if "Eagle3" in str(raw.get("architectures")):
        return load_eagle3(directory, raw, target)
    return load_model(directory, torch.float32, SmallModel)


def load_eagle3(directory, raw, target):
    weights = read_tensors(directory)
    config = read_config(directory, raw, weights)
    config = replace(config, tie_word_embeddings=False, bos_token_id=target.config.bos_token_id,
                     eos_token_ids=target.config.eos_token_ids, suppress_tokens=target.config.suppress_tokens)
    D, V = target.config.hidden_size, target.config.vocab_size
    layers = (raw.get("eagle_config") or raw).get("eagle_aux_hidden_state_layer_ids") or target.feature_layers
    expected = ((config.num_hidden_layers, 1, "num_hidden_layers"), (config.hidden_size, D, "hidden_size"),
                (raw.get("target_hidden_size") or D, D, "target_hidden_size"), (tuple(layers), target.feature_layers, "layers read"),
                (bool(raw.get("norm_before_residual")), False, "norm_before_residual"),
                (config.attention_bias or config.output_bias or config.qk_norm, False, "having biases or q/k norms"))
    for found, wanted, what in expected:
        if found != wanted:
            raise UserError(f"{directory}: {what} is {found}, expected {wanted} for this target")

    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    vocabulary = None if d2t is None else torch.arange(len(d2t)) + d2t  # d2t holds offsets
    if vocabulary is not None:
        known = torch.zeros(V, dtype=torch.bool)
        if not (vocabulary.diff() > 0).all() or vocabulary[0] < 0 or vocabulary[-1] >= V:
            raise UserError(f"{directory}: d2t does not lead to ascending ids in 0..{V - 1}")
        known[vocabulary] = True
        if t2d is not None and not torch.equal(t2d.bool(), known):
            raise UserError(f"{directory}: t2d and d2t do not name the same ids")
        vocabulary = vocabulary if len(vocabulary) < V else None
    draft = Draft(target, config, vocabulary)
    draft.kind = "head made elsewhere"
    weights = {name: t.float() for name, t in weights.items()}
    weights.setdefault("lm_head.weight", draft.lm_head.weight.detach())  # without one it is the target's
    return fill_draft(draft, weights | ({} if vocabulary is None else {"vocabulary": vocabulary}), directory)


class Tokenizer:
    def __init__(self, config, directory):
        library = need("tokenizers")
        try:
            self.inner = library.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{directory}: no tokenizer.json that can be read ({str(error).splitlines()[0]})") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.begin, self.vocab_size, self.directory = config.bos_token_id, config.vocab_size, directory

    def encode(self, text):
        """-> ids.  Special tokens may be written out, as chat templates do; a begin token is not doubled."""
        ids = self.inner.encode(text).ids
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(f"{self.directory}: the tokenizer gives id {max(ids)}, the model has {self.vocab_size}")
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.begin else ids

    def stream(self):
        """-> put(token) -> text, and end() -> what is left of it.

        Text comes out as soon as it is whole characters.  Tokens are decoded after those that came out last, because
        what a token reads as may hang on the one before it (a space at the start of a word)."""
        ids, shown = [], 0  # decoded so far: ids[:shown], the last that came out; and those that wait

        def put(token, last=False):
            nonlocal ids, shown
            ids = ids + ([] if last else [token])
            before, now = self.inner.decode(ids[:shown]), self.inner.decode(ids)
            if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
                return ""
            ids, shown = ids[shown:], len(ids) - shown
            return now[len(before) :]

        return put, lambda: put(None, last=True)


# ---- out ------------------------------------------------------------------------------------------------


def config_json(config, dtype, **changes):
    """Our Config as transformers, SGLang and vLLM read it; RoPE in the spelling of transformers 4, which 5 reads too."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias and not config.output_bias else "llama"
    names = (*SIZES, "rope_theta", "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
    scaling = config.rope_scaling and {"rope_type": "llama3"} | config.rope_scaling
    return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
            "attention_bias": config.output_bias, "mlp_bias": False, "rope_scaling": scaling,
            "torch_dtype": str(dtype).removeprefix("torch."), "eos_token_id": list(config.eos_token_ids) or None,
            **{name: getattr(config, name) for name in names}} | changes


def write(directory, tensors, **files):
    """A directory that is either whole or not there: {name}.json and model.safetensors."""
    new = Path(f"{directory}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    need("safetensors.torch").save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (new / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    new.rename(directory)


def write_model(model, directory):
    """A Transformer in Hugging Face layout.  Its suppressed ids become generation's."""
    config, tensors = model.config, dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    raw = config_json(config, model.lm_head.weight.dtype)
    generation = {name: raw[name] for name in ("bos_token_id", "eos_token_id")} | {"suppress_tokens": list(config.suppress_tokens) or None}
    write(directory, tensors, config=raw, generation_config=generation)


def export_draft(draft, directory, origin, K):
    """The draft where engines can load it; returns how to serve it."""
    if isinstance(draft, SmallModel):
        write_model(draft, directory)
        for file in Path(origin).glob("tokenizer*.json"):
            shutil.copy(file, directory)
        sglang, vllm = "STANDALONE", "draft_model"
    else:
        config, tensors = draft.config, dict(draft.state_dict())
        vocabulary = tensors.pop("vocabulary", torch.arange(config.vocab_size)).cpu()
        tensors["d2t"] = vocabulary - torch.arange(len(vocabulary))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, vocabulary, True)
        if not draft.own_embedding:
            del tensors["embed_tokens.weight"]  # engines take the target's
        raw = config_json(config, draft.fc.weight.dtype, architectures=["LlamaForCausalLMEagle3"], model_type="llama",
                          draft_vocab_size=len(vocabulary))
        write(directory, tensors, config=raw)
        sglang, vllm = "EAGLE3", "eagle3"
    speculative = json.dumps({"method": vllm, "model": str(directory), "num_speculative_tokens": K})
    return (f"exported to {directory}\n"
            f"SGLang   --speculative-algorithm {sglang} --speculative-draft-model-path {directory} "
            f"--speculative-num-steps {K} --speculative-eagle-topk 1 --speculative-num-draft-tokens {K + 1}\n"
            f"vLLM     --speculative-config '{speculative}'")


# ---- side by side with transformers ------------------------------------------------------------------------


@torch.no_grad()
def bench(args):
    """Tokens/s of plain and of speculative decoding, ours and transformers', greedy, on the same prompts.

    A ratio is taken within a turn, where the arms follow one another; what is printed is the median of the turns."""
    from aurora import find_draft
    from serve import LONGEST, Request, compile_forwards, generate, slots_for

    transformers = need("transformers")
    dtype, K = getattr(torch, args.dtype), args.num_speculative_tokens
    target, tokenizer = load_target(args.checkpoint, dtype)
    target.eval().config.eos_token_ids = ()  # every answer has its full length, in every arm
    draft = find_draft(args.draft, target)[0].to(dtype)
    target.feature_layers = draft.feature_layers or ()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(locate(args.checkpoint), dtype=dtype).eval()
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0)
    assisted = {}
    if isinstance(draft, NGram):
        assisted = {"prompt_lookup_num_tokens": K, "max_matching_ngram_size": draft.longest}
    elif isinstance(draft, SmallModel):
        assistant = transformers.AutoModelForCausalLM.from_pretrained(locate(args.draft), dtype=dtype).eval()
        assistant.generation_config.update(
            eos_token_id=None, num_assistant_tokens=K, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
        assisted = {"assistant_model": assistant}

    if args.compile and K > LONGEST:
        raise UserError(f"--compile makes graphs for up to {LONGEST} drafted tokens, got --num-speculative-tokens {K}")
    if args.compile:
        compile_forwards(target, [draft], slots_for(128 + args.max_new_tokens + 2 * LONGEST + 1))

    lines = filter(None, Path(args.prompts).read_text(encoding="utf-8").split("\n"))
    prompts = [ids for ids in (tokenizer.encode(line)[:128] for line in lines) if len(ids) > 8]
    acceptance = []

    def ours(draft, ids):
        trace, _ = generate(target, draft, Request(ids, args.max_new_tokens, 0, 0.0), K if draft else 0)
        if draft:
            acceptance.append(1 + trace.num_accepted.float().mean().item())
        return trace.ids[len(ids) :][: args.max_new_tokens].tolist()

    def generated(ids, **more):
        return theirs.generate(torch.tensor([ids]), max_new_tokens=args.max_new_tokens, do_sample=False, **more)[0, len(ids) :].tolist()

    arms = {"ours plain": lambda ids: ours(None, ids), "theirs plain": generated, "ours speculative": lambda ids: ours(draft, ids)}
    if assisted:
        arms["theirs assisted"] = lambda ids: generated(ids, **assisted)
    speeds, differ, names = {name: [] for name in arms}, 0, list(arms)
    for turn in range(-1, args.turns):  # the turn before the first warms up
        answers = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            answers[name] = arms[name](prompts[turn % len(prompts)])
            if turn >= 0:
                speeds[name].append(len(answers[name]) / (time.perf_counter() - begun))
        differ += turn >= 0 and len(set(map(tuple, answers.values()))) > 1

    ratios = (("ours plain", "theirs plain"), ("ours speculative", "theirs assisted"), ("ours speculative", "ours plain"),
              ("ours speculative", "theirs plain"), ("theirs assisted", "theirs plain"))
    rows = {f"{name}, tokens/s": values for name, values in speeds.items()}
    rows |= {f"{a} / {b}": [x / y for x, y in zip(speeds[a], speeds[b])] for a, b in ratios if {a, b} <= set(arms)}
    how = f"{args.dtype}, ours compiled" if args.compile else args.dtype
    print(f"{args.checkpoint}, draft {args.draft}, K = {K}, {how}, {torch.get_num_threads()} threads, {args.turns} turns of "
          f"{args.max_new_tokens} tokens, greedy; acceptance length {sum(acceptance) / len(acceptance):.2f}; answers differ in {differ} turns")
    for name, values in rows.items():
        low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        print(f"{name:34s} {median:8.2f}   (quartiles {low:.2f} to {high:.2f})")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", metavar="FILE|DIR|NAME")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="write this project's FILE in Hugging Face layout")
    what.add_argument("--bench", action="store_true", help="against transformers, plain and assisted")
    parser.add_argument("--draft", default="ngram", metavar="ngram|DIR|NAME")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--prompts", metavar="FILE", default=Path(__file__).with_name("README.md"), help="a prompt a line")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="our forwards")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.bench:
        return bench(args)
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: name a directory that is not there yet")
    write_model(load_ours(args.checkpoint)[0], args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
