"""A GGUF of a Llama, Qwen2 or Qwen3 -> a directory in Hugging Face layout, by transformers' loader.

    pip install -r requirements-gguf.txt
    python -m formats.gguf FILE.gguf --out DIR
    python aurora.py --target DIR --prompts FILE

The weights are dequantised, to what the quantised ones stand for, and by default rounded to
bfloat16: a two-hundredth of what four bits have lost already.  Tokenizer, chat template and special
tokens come with them.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from formats.files import need, shorten, write
from model import UserError
from support.command import command

KINDS = ("llama", "qwen2", "qwen3")
EXTRA = "requirements-gguf.txt"


def is_gguf(path):
    """Whether it is a file that begins as every GGUF does."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def check(path):
    """Raises UserError if this is no GGUF whose model and quantisation can be read."""
    gguf = need("gguf", "reading a GGUF", EXTRA)
    if not Path(path).is_file():
        raise UserError(f"no file {path}: expected a GGUF")
    if not is_gguf(path):
        raise UserError(f"{path} is not a GGUF: it does not begin with those letters")
    try:
        reader = gguf.GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
    except Exception as error:  # a truncated file, or another version's
        raise UserError(f"{path} is not a whole GGUF ({type(error).__name__})") from None
    if kind not in KINDS:
        raise UserError(f"{path}: a model of architecture {shorten(kind)} is not supported: "
                        f"expected {', '.join(KINDS)}")
    for size in (f"{kind}.block_count", f"{kind}.embedding_length", "tokenizer.ggml.tokens"):
        if size not in reader.fields:  # transformers would take a model of seven billion for it
            raise UserError(f"{path} holds no {size}: it is no whole language model")
    for tensor in reader.tensors:
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except (NotImplementedError, KeyError, ValueError):
            raise UserError(f"{path}: {shorten(tensor.name)} is quantised as "
                            f"{tensor.tensor_type.name}, which cannot be read here") from None


def convert(path, directory, dtype=torch.bfloat16):
    """Writes the directory.  Raises UserError, and OSError if it cannot be written."""
    if Path(directory).exists():
        raise UserError(f"{directory} exists: name a directory that is not there yet")
    check(path)
    for module in ("accelerate", "safetensors"):
        need(module, "reading a GGUF", EXTRA)
    transformers = need("transformers", "reading a GGUF", EXTRA)
    transformers.utils.logging.set_verbosity_error()
    folder, name = Path(path).resolve().parent, Path(path).name
    quantised = transformers.GgufConfig(gguf_file=name, dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=quantised, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # transformers raises many kinds
        reason = shorten(" ".join(str(error).split()))
        raise UserError(f"{path}: transformers cannot read it ({type(error).__name__}: {reason})"
                        ) from None
    raw = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    raw["architectures"] = [type(model).__name__]
    for own in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        raw.pop(own, None)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    write(directory, tensors, config=raw, **tokenizer_files(tokenizer))


def tokenizer_files(tokenizer):
    """{name: what its .json holds}, the chat template in tokenizer_config.json."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        return {file.stem: json.loads(file.read_text()) for file in Path(folder).glob("*.json")}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m formats.gguf", description="A GGUF, as a directory that --target takes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--out", metavar="DIR", required=True, help="that is not there yet")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    try:
        convert(args.file, args.out, getattr(torch, args.dtype))
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from None
    print(f"python aurora.py --target {args.out} --prompts FILE")


if __name__ == "__main__":
    command(main, "formats.gguf")
