"""The vocabulary of a pruned draft: which of the target's ids it can say.

Here it is `vocabulary` (V_draft,) int64, the ids themselves, ascending.  EAGLE-3 files spell it as

    d2t (V_draft,) integers   offsets: vocabulary[i] = i + d2t[i]
    t2d (V,) bool             true at every id of the vocabulary

and leave both out where the draft can say all V ids.
"""

import torch

from model import UserError


def common_ids(config, N, said=None):
    """The N ids that are said most often, the end tokens among them -> vocabulary (N,).

    said (V,): how often each was; of equals, and where it is not known, the lowest: a byte-pair
    vocabulary is numbered in the order of its merges, so low ids are common ones."""
    never = set(config.suppress_tokens)
    allowed = [i for i in range(config.vocab_size) if i not in never]
    if said is not None:
        count = said.tolist()
        allowed.sort(key=lambda i: -count[i])
    if not 1 <= N <= len(allowed):
        raise UserError(f"--draft-vocab {N}: the target says only {len(allowed)} ids")
    ends = [i for i in config.eos_token_ids if i not in never]
    first = list(dict.fromkeys([*ends, *allowed]))[:N]
    return torch.tensor(sorted(first))


def to_offsets(vocabulary, V):
    """-> {"d2t", "t2d"}, nothing where the draft can say all V ids."""
    if vocabulary is None or len(vocabulary) == V:
        return {}
    vocabulary = vocabulary.cpu()
    known = torch.zeros(V, dtype=torch.bool)
    known[vocabulary] = True
    return {"d2t": vocabulary - torch.arange(len(vocabulary)), "t2d": known}


def from_offsets(d2t, t2d, V, path):
    """-> vocabulary (V_draft,) int64, None if that is all V ids.  d2t, t2d: None if not there.

    Checked: that d2t is int32 or int64, one row of 1 to V numbers, and leads to ascending ids in
    0..V-1; that t2d is bool, (V,), and names the same ids.  Some files hold ids where offsets
    belong.  Read as offsets they name other ids, so a t2d tells.  Without one, ids that do not
    ascend lead to none that do; ids that ascend never repeat, while offsets repeat wherever two
    known ids are neighbours.  So a d2t without t2d whose numbers all ascend could be either, and
    is refused."""

    def refuse(reason):
        raise UserError(f"{path}: {reason}")

    if d2t is None:
        if t2d is not None:
            refuse("t2d without d2t")
        return None
    if d2t.dtype not in (torch.int32, torch.int64):
        refuse(f"d2t is {d2t.dtype}, expected int64")
    if d2t.ndim != 1 or not 1 <= len(d2t) <= V:
        refuse(f"d2t has shape {tuple(d2t.shape)}, expected one row of 1 to {V} offsets")
    offsets = d2t.long()
    if offsets.min() < 0 or offsets.max() > V - len(offsets) or (offsets.diff() < 0).any():
        refuse(f"d2t does not lead to ascending ids in 0..{V - 1}: "
               "expected offsets, id = i + d2t[i]")
    vocabulary = torch.arange(len(offsets)) + offsets
    if t2d is None:
        if len(offsets) < V and (offsets.diff() > 0).all():
            refuse("d2t could be offsets or ids, and there is no t2d to tell")
    elif t2d.dtype != torch.bool or t2d.shape != (V,):
        refuse(f"t2d is {t2d.dtype} {tuple(t2d.shape)}, expected bool ({V},)")
    elif not torch.equal(t2d.nonzero()[:, 0], vocabulary):
        refuse("t2d and d2t do not name the same ids")
    return vocabulary if len(vocabulary) < V else None
