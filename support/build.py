"""Builds kernels.cu once, with g++ for the CPU or nvcc for CUDA, and loads the operator."""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from model import UserError

SOURCE = Path(__file__).parent.parent / "kernels.cu"
SCHEMA = (
    "(Tensor target_logits, Tensor? draft_logits, Tensor draft_tokens, Tensor coins, "
    "Tensor temperature, bool block) -> (Tensor, Tensor, Tensor)"
)


@functools.cache
def kernel(device):
    """The fused form of accept_torch for tensors on "cpu" or "cuda", or None where torch has
    to do: AURORA_KERNEL=torch asks for that, =fused makes it an error."""
    choice = os.environ.get("AURORA_KERNEL", "")
    if choice not in ("", "fused", "torch"):
        raise UserError(f"AURORA_KERNEL must be torch or fused, got {choice!r}")
    if choice == "torch" or device not in ("cpu", "cuda"):
        return None
    try:
        load_kernel(device, SOURCE)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        if choice == "fused":
            raise UserError(f"AURORA_KERNEL=fused, but kernels.cu was not built: {error}") from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"torch decides what is accepted: kernels.cu was not built: {reason}")
        return None
    operator = torch.ops.aurora.accept.default

    def fused(target_logits, draft_logits, *rest):
        return operator(dense_rows(target_logits), dense_rows(draft_logits), *rest)

    return fused


def dense_rows(logits):
    """The kernel takes any strides, but the ids of a row must lie side by side."""
    return logits if logits is None or logits.stride(-1) == 1 else logits.contiguous()


@functools.cache
def load_kernel(device, source):
    """Loads the library, and first makes it if the cache does not hold it.

    The cache is torch's, ~/.cache/torch_extensions or $TORCH_EXTENSIONS_DIR; what the library
    depends on is in its name.  It is built in a folder of its own and moved into place, so there is
    no lock that a Ctrl-C could leave."""
    declare_operator()
    capability = torch.backends.cpu.get_cpu_capability()
    march = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}.get(capability, [])
    # Not -ffast-math: NaN must stay NaN.  And a * b - c * d must be 0 if a = c and b = d, so the
    # compiler fuses none.
    flags = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    built_from = [source.read_text(), torch.__version__, "-fmad=false", *flags, *march]
    if device == "cuda":
        built_from += [torch.version.cuda, *torch.cuda.get_arch_list()]
        count = range(torch.cuda.device_count())
        built_from += [torch.cuda.get_device_capability(i) for i in count]
    name = f"aurora_{device}_{hashlib.sha256(repr(built_from).encode()).hexdigest()[:16]}"
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions"
    library = Path(home) / f"{name}.so"
    if not library.exists():
        compile_kernel(device, source, name, library, [*flags, *march])
    else:
        torch.ops.load_library(library)


def compile_kernel(device, source, name, library, flags):
    from torch.utils import cpp_extension

    cpp_extension.verify_ninja_availability()
    how_long = "a minute" if device == "cuda" else "some seconds"
    print(f"compiling kernels.cu for {device}, once: {how_long} ...", file=sys.stderr, flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        cpp_extension.load(
            name, [str(source)], extra_cflags=["-x", "c++", *flags],
            extra_cuda_cflags=["-fmad=false"], build_directory=folder,
            with_cuda=device == "cuda", is_python_module=False,
        )
        os.replace(Path(folder) / library.name, library)


@functools.cache
def declare_operator():
    """aurora::accept: its schema, and what it returns, (B,) int64 each: tokens kept, next token,
    status.  Whoever calls it directly has to look at the status."""
    torch.library.define("aurora::accept", SCHEMA)

    def shapes(target_logits, draft_logits, draft_tokens, *rest):
        return tuple(draft_tokens.new_empty(draft_tokens.shape[0]) for _ in range(3))

    torch.library.register_fake("aurora::accept", shapes)
