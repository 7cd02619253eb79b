"""New weights for a draft into a vLLM that runs: what its worker needs, and no more.

    llm = LLM(..., worker_extension_cls="formats.vllm_swap.Swap")
    llm.collective_rpc("swap", args=("OUT/v000012",))

Between two steps of the engine; requests that run go on.  Tried with vLLM 0.32 (docs/engines.md).
"""

import time
from pathlib import Path

import torch

from formats.files import need
from model import UserError


class Swap:
    """A worker extension: vLLM gives its worker this method, and `self` is the worker."""

    def swap(self, directory):
        """Loads an EAGLE-3 directory into the draft -> seconds.  Raises UserError, with nothing
        changed, if it is not whole, does not fit, or would be written into the target."""
        from vllm.model_executor.model_loader import reload

        start, runner = time.perf_counter(), self.model_runner
        target, draft = runner.model, runner.drafter.model
        check_apart(draft, target)
        config = runner.vllm_config.speculative_config.draft_model_config
        tensors = read_head(directory, draft.config, runner.model_config.get_hidden_size())
        with torch.no_grad():
            reload.initialize_layerwise_reload(draft)
            draft.load_weights(tensors.items())
            reload.finalize_layerwise_reload(draft, config)
        return time.perf_counter() - start


def check_apart(draft, target):
    """Raises UserError if the draft's lm_head is the target's: vLLM makes them one if they are
    equal at load, and what is loaded into the draft changes the target's answers."""
    own, other = draft.lm_head, target.lm_head
    if own is other or own.weight is other.weight:
        raise UserError("the draft's lm_head is the target's own: start the engine with a head "
                        "that this project exported")


def read_head(directory, config, target_width):
    """-> {name: tensor}, finite.  config: the draft's that serves, whose sizes the head must have;
    its matrices have others, where the engine has packed them for its processor."""
    path = Path(directory) / "model.safetensors"
    try:
        tensors = need("safetensors.torch", "a swap").load(path.read_bytes())
    except Exception as error:  # half of a file, or what has never been one
        raise UserError(f"{path} is no whole safetensors file ({type(error).__name__})") from None
    sizes = {"lm_head.weight": (config.draft_vocab_size, config.hidden_size),
             "fc.weight": (config.hidden_size, 3 * target_width)}
    for name, size in sizes.items():
        if name not in tensors or tensors[name].shape != size:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise UserError(f"{path} does not fit the draft that serves: {name} is {found}, "
                            f"expected {size}")
    bad = [name for name, tensor in tensors.items()
           if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds NaN or infinity in {bad[0]}")
    return tensors
