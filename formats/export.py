"""Out: our models where transformers, SGLang and vLLM load them.

    python -m formats.export weights/target.pt --out DIR    a file of this project, converted

Three things that engines are particular about are seen to here.  `d2t` and `t2d` stand only in a
head that cannot say every id: vLLM 0.32 refuses them elsewhere.  The layers that the head reads are
named as vLLM counts them, by their inputs; SGLang does not look there, and has the same default.
And no head's lm_head is the target's: see `apart`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from formats.files import need, write
from formats.huggingface import SIZES
from formats.pruned import to_offsets
from formats.small_model import SmallModel, is_small_model
from model import Transformer, UserError
from support.command import command
from support.store import fill, load


def config_json(config, dtype, **changes):
    """Our Config as others read it; RoPE in the spelling of transformers 4, which 5 reads too."""
    kind = "qwen2" if config.attention_bias and not config.output_bias else "llama"
    kind = "qwen3" if config.qk_norm else kind
    scaling = config.rope_scaling and {"rope_type": "llama3"} | config.rope_scaling
    own = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind,
        "hidden_act": "silu", "attention_bias": config.output_bias, "mlp_bias": False,
        "rope_scaling": scaling, "torch_dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": list(config.eos_token_ids) or None,
        **{name: getattr(config, name) for name in (*SIZES, *own)},
    } | changes


def write_model(model, directory):
    """A Transformer in Hugging Face layout.  Its suppressed ids become generation's."""
    config, tensors = model.config, dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    raw = config_json(config, model.lm_head.weight.dtype)
    generation = {
        "bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"],
        "suppress_tokens": list(config.suppress_tokens) or None,
    }
    write(directory, tensors, config=raw, generation_config=generation)


def write_head(draft, directory, target, record=None):
    """A head as an EAGLE-3 directory, without an embedding: engines take the target's.  record: of
    how it was made, for record.json."""
    config, tensors = draft.config, dict(draft.state_dict())
    tensors |= to_offsets(tensors.pop("vocabulary", None), config.vocab_size)
    tensors["lm_head.weight"] = apart(tensors["lm_head.weight"], target.lm_head.weight)
    raw = config_json(
        config, draft.fc.weight.dtype, architectures=["LlamaForCausalLMEagle3"],
        model_type="llama", draft_vocab_size=len(draft.lm_head.weight),
        eagle_aux_hidden_state_layer_ids=list(target.feature_layers))
    write(directory, tensors, config=raw, **({"record": record} if record else {}))


def apart(head, other):
    """A head's lm_head, which differs from the target's even when an engine has rounded both.

    vLLM makes two matrices that are equal at load one, and new weights for the draft are then
    written into the target, whose answers change.  A head that is new, or hardly learned, has a
    copy of the target's.  Then its largest entry is moved to the bfloat16 next to it, towards 0: a
    change of at most 1/128 in one number of V * D, which float16 and float32 keep as well."""
    if head.shape != other.shape:
        return head
    types = (torch.bfloat16, torch.float16)
    other = other.detach().to(head.device)
    if not any(torch.equal(head.to(dtype), other.to(dtype)) for dtype in types):
        return head
    head = head.detach().clone(memory_format=torch.contiguous_format)
    entry = head.view(-1)[other.abs().argmax()]
    rounded = entry.to(torch.bfloat16)
    entry.copy_(torch.nextafter(rounded, torch.zeros_like(rounded)))
    return head


def export_draft(draft, directory, origin, temperature, target, K=4):
    """Writes the draft where engines can load it -> how to serve it with K drafted tokens a round.

    origin: where the draft came from; a small model takes the tokenizer from there, if it is a
    directory that has one.  target: the one that the draft serves.  Raises OSError if `directory`
    cannot be written."""
    if isinstance(draft, SmallModel):
        write_model(draft, directory)
        for file in sorted(Path(origin).glob("tokenizer*.json")):
            shutil.copy(file, directory)
        sglang, vllm = "STANDALONE", "draft_model"
    else:
        write_head(draft, directory, target)
        sglang, vllm = "EAGLE3", "eagle3"
    speculative = {"method": vllm, "model": str(directory), "num_speculative_tokens": K}
    if temperature > 0:  # else it drafts greedily, and fewer tokens are accepted
        speculative["draft_sample_method"] = "probabilistic"
    speculative["rejection_sample_method"] = "block"
    return (
        f"exported to {directory}\n"
        f"SGLang   --speculative-algorithm {sglang} --speculative-draft-model-path {directory} "
        f"--speculative-num-steps {K} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {K + 1}\n"
        f"vLLM     --speculative-config '{json.dumps(speculative)}'"
    )


def convert(path, directory):
    """A file of this project that holds a whole language model -> a directory."""
    need("safetensors", "writing a checkpoint")
    if Path(directory).exists():
        raise UserError(f"{directory} exists: name a directory that is not there yet")
    if not is_small_model(path):
        raise UserError(f"{path} is a head, which says nothing without its target: "
                        "python aurora.py --target FILE --draft FILE --no-learn --export DIR")
    config, weights, _ = load(path)
    try:
        write_model(fill(Transformer(config), weights, path), directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m formats.export",
        description="A model of this project, where transformers, SGLang and vLLM load it.")
    parser.add_argument("checkpoint", metavar="FILE")
    parser.add_argument("--out", metavar="DIR", required=True, help="that is not there yet")
    args = parser.parse_args(argv)
    convert(args.checkpoint, args.out)


if __name__ == "__main__":
    command(main, "formats.export")
