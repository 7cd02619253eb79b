"""In which floating-point type to multiply.  Processors differ: bfloat16 takes sixty times as long
as float32 where there are no instructions for it, and where there are, it halves what is read and
makes nine tokens cost hardly more than one."""

import copy
import functools
import time
import warnings
from statistics import median

import torch

from model import by_columns, rope_at

SMALL = 50e6  # parameters, below which a second thread gains nothing
TRIED = 100e6  # bytes of layers that are timed: more than a cache holds
ROUND, TIMES = 5, 7  # tokens a forward pass; passes

# Under autocast a norm's weight stays float32 and what it weighs need not: as it is meant.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")


@functools.cache
def fast_dtype():
    """For large products, as in training."""
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        took[dtype] = time.perf_counter() - start
    return min(took, key=took.get)


def replay_dtype(device):
    """For a learner: bfloat16 where a CPU has AMX for it, else float32."""
    amx = device == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if amx else torch.float32


def ready_to_serve(target, device, dtype):
    """The target where it serves, in float32, bfloat16 or, with "auto", what verifies faster there;
    and on a CPU with as many threads as help."""
    if device == "cpu" and sum(p.numel() for p in target.parameters()) < SMALL:
        torch.set_num_threads(1)
    if dtype != "auto":
        dtype = getattr(torch, dtype)
    elif not all(torch.equal(p, p.bfloat16().to(p.dtype)) for p in target.parameters()):
        dtype = torch.float32  # its weights would be rounded: another target
    else:
        dtype = serving_dtype(target) if device == "cpu" else torch.bfloat16
    return target.to(device, dtype).eval()


@torch.inference_mode()
def serving_dtype(target):
    """What a few of the target's layers take less time in, for a round's few tokens; both in turn,
    so that what else the machine does slows both."""
    size = 4 * sum(p.numel() for p in target.model.layers[0].parameters())
    layers = target.model.layers[: max(1, int(TRIED / size))]
    tried = {dtype: copy.deepcopy(layers).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    took, positions = {dtype: [] for dtype in tried}, torch.arange(ROUND)[None]
    by_columns(tried[torch.float32])
    for _ in range(TIMES):
        for dtype, layers in tried.items():
            h = torch.ones(1, ROUND, target.config.hidden_size, dtype=dtype)
            where = *rope_at(target, positions, dtype), None
            start = time.perf_counter()
            for layer in layers:
                h = layer(h, *where)
            took[dtype].append(time.perf_counter() - start)
    return min(took, key=lambda dtype: median(took[dtype]))
