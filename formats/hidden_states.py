"""What an engine leaves of a request: its hidden states, made into a Trace that a learner takes.

vLLM's `extract_hidden_states` writes {id}.safetensors with

    token_ids      (T,) int64             prompt and answer, but for the answer's last token
    hidden_states  (T, 4, D) any float    what enters layers 2, L//2 and L-3, and what leaves the
                                          last one, before the norm

and holds a lock on {id}.safetensors.lock until it is whole.  Nothing in it says where the prompt
ends.  A name {id}.{tokens of the prompt}.safetensors does (docs/engines.md); without one the prompt
is learned from too, as if the target had said it.

Letters: T tokens, P of them the prompt's, N the answer's, V vocabulary, D hidden width, L layers.
"""

import fcntl
import math
import re

import torch

from formats.files import need
from model import UserError
from support.trace import Trace

LARGEST = 1e9  # of a hidden state


def read_trace(path, target, law, context):
    """A file -> its Trace without drafted tokens, where the target's weights are.

    law: the temperature, top-p and top-k that served; context: the longest text that the draft can
    read.  Of the target only the norm and the head are used.  Raises UserError with the reason why
    the file cannot be learned from."""
    ids, states = read_tensors(path)
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise UserError(f"token_ids are {ids.dtype} {tuple(ids.shape)}, expected int64 (T,)")
    T, D, V = len(ids), target.config.hidden_size, target.config.vocab_size
    if states.shape != (T, 4, D) or not states.is_floating_point():
        layers = [*target.feature_layers, target.config.num_hidden_layers]
        raise UserError(f"hidden_states are {states.dtype} {tuple(states.shape)}, expected floats "
                        f"{(T, 4, D)}, of layers {layers}")
    named = re.search(r"\.(\d+)\.safetensors$", path.name)
    P = max(2, int(named[1])) if named else 2  # a round starts at a token with one before it
    if T <= P:
        raise UserError(f"{T} tokens, a prompt of {P} and no answer: did the request ask for "
                        "include_output_tokens?")
    if T > context:
        raise UserError(f"its {T} tokens are more than the draft's context of {context}")
    if not 0 <= ids.min() <= ids.max() < V:
        raise UserError(f"its tokens are not all in 0..{V - 1}")
    weight, N = target.lm_head.weight, T - P
    ids, states = ids.to(weight.device), states.to(weight)
    if not states.abs().max() < LARGEST:  # NaN is not less
        raise UserError("hidden_states hold NaN, infinity or numbers beyond any model's")
    with torch.no_grad():
        hidden = target.model.norm(states[P - 1 : -1, 3])  # (N, D)
    check_target(hidden, ids[P:], target)
    return Trace(
        ids=ids, prompt_length=P, features=states[:-1, :3].flatten(1),
        starts=torch.arange(P - 2, T - 2, device=ids.device),
        draft_tokens=ids.new_empty(N, 0), behaviour=weight.new_empty(N, 0),
        hidden=hidden[:, None], committed=torch.ones_like(ids[P:]),
        temperature=law[0], top_p=law[1], top_k=law[2])


def read_tensors(path):
    """-> token_ids, hidden_states, whatever they are.  Read, not mapped: an engine that starts
    again writes over files of the same name."""
    load = need("safetensors.torch", "reading what an engine wrote").load
    try:
        tensors = load(path.read_bytes())
    except Exception as error:  # half of a file, or what has never been one
        raise UserError(f"not a whole safetensors file ({type(error).__name__})") from None
    if not {"token_ids", "hidden_states"} <= tensors.keys():
        raise UserError("it holds no token_ids and hidden_states")
    return tensors["token_ids"], tensors["hidden_states"]


@torch.no_grad()
def check_target(hidden, tokens, target, most=64):
    """Raises UserError unless the tokens (N,) are likelier than by chance under the hidden states
    (N, D) before them.  Those of another model of the same shape are not found out otherwise."""
    some = slice(None, None, -(-len(tokens) // most))
    logprobs = target.lm_head(hidden[some]).float().log_softmax(-1)
    if not logprobs.gather(-1, tokens[some, None]).mean() > -math.log(target.config.vocab_size):
        raise UserError("its text is no likelier than chance by its hidden_states: are they this "
                        "target's, and from before the norm?")


# ---- a folder ------------------------------------------------------------------------------------


def new_files(directory, seen):
    """-> [(stamp, path)], the oldest first, of the files that nobody is writing and that are not
    as they were `seen`, {name: stamp}.  One that was refused and then written to its end is new."""
    found = []
    for path in directory.glob("*.safetensors"):
        stamp = stamp_of(path)
        if stamp and stamp != seen.get(path.name) and not is_locked(path):
            found.append((stamp, path))
    return sorted(found)


def stamp_of(path):
    """[nanoseconds, bytes] of a file; None if it has gone, or is something else."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_mtime_ns, stat.st_size] if path.is_file() else None


def is_locked(path):
    """Whether the engine is still writing.  Its empty lock file stays when it is done."""
    try:
        with open(f"{path}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def remove(path):
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
