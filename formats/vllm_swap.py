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
        tensors = read_head(directory, draft.lm_head.weight, draft.model.fc.weight)
        with torch.no_grad():
            reload.initialize_layerwise_reload(draft)
            draft.load_weights(tensors.items())
            config = runner.vllm_config.speculative_config.draft_model_config
            reload.finalize_layerwise_reload(draft, config)
        return time.perf_counter() - start


def check_apart(draft, target):
    """Raises UserError if the draft's lm_head is the target's: vLLM makes them one if they are
    equal at load, and what is loaded into the draft changes the target's answers."""
    if draft.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr():
        raise UserError("the draft's lm_head is the target's own: start the engine with a head "
                        "that this project exported")


def read_head(directory, lm_head, fc):
    """-> {name: tensor}, finite.  lm_head, fc: the matrices that serve, whose widths it must have;
    the engine pads the rows of its lm_head."""
    path = Path(directory) / "model.safetensors"
    try:
        tensors = need("safetensors.torch", "a swap").load(path.read_bytes())
    except Exception as error:  # half of a file, or what has never been one
        raise UserError(f"{path} is no whole safetensors file ({type(error).__name__})") from None
    nothing = torch.empty(0, 0)
    head, fuse = (tensors.get(f"{name}.weight", nothing).shape for name in ("lm_head", "fc"))
    fits = len(head) == 2 and head[1] == lm_head.shape[1] and 0 < head[0] <= len(lm_head)
    if not fits or fuse != fc.shape:
        raise UserError(f"{path} does not fit the draft that serves: lm_head.weight {tuple(head)}, "
                        f"fc.weight {tuple(fuse)}")
    bad = [name for name, tensor in tensors.items()
           if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds NaN or infinity in {bad[0]}")
    return tensors
