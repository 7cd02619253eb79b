"""A small language model as the draft.  It needs nothing of the target but its vocabulary: it reads
the text itself, and it learns like the head does, all of it.

Letters: B batch rows, T tokens, K drafted tokens a round, R round starts, V vocabulary,
         D hidden width.
"""

import torch

from draft import Proposer
from model import Transformer, UserError, additive
from support.store import fill, load


class SmallModel(Proposer, Transformer):
    """Proposer's interface over a Transformer.  What a head calls position t, where it reads the
    target's features of token t and the token after it, is position t + 1 here."""

    vocabulary = None  # it can say every id

    def read(self, features, tokens, positions, last, cache):
        """As Draft.read; features are not looked at.  The first of the tokens was read before,
        unless it begins the prompt: reading it again writes the same."""
        where = torch.cat([positions[:, :1], positions + 1], dim=1)
        hidden, _ = self(tokens, within(where, cache), cache)  # (B, T+1, D)
        h = hidden[cache.rows, last[:, None] + 1]  # (B, 1, D)
        return h, self.logits(h)

    def extend(self, h, token, position, cache):
        """As Draft.extend; what it knows of the text is in its cache, so h is not looked at."""
        h, _ = self(token, within(position + 1, cache), cache)
        return h, self.logits(h)

    def replay(self, features, tokens, starts, chains):
        """As Draft.replay -> logits (B, R, K, V), in one forward: the text and, after it, all the
        chains.  A drafted token sees the text up to where its round started and the tokens drafted
        before it, and stands where it stood."""
        B, R, steps = chains.shape  # steps = K-1
        T, device = tokens.shape[1], tokens.device
        place, step = torch.arange(T, device=device), torch.arange(steps, device=device)
        known = starts + 1  # (B, R) the last token that a round knew
        drafted = known[..., None] + 1 + step  # (B, R, steps) where its own tokens stand
        positions = torch.cat([place.expand(B, T), drafted.flatten(1)], dim=1)

        round_of, step_of = torch.arange(R, device=device).repeat_interleave(steps), step.repeat(R)
        own = (round_of[:, None] == round_of) & (step_of[:, None] >= step_of)  # (R*steps, R*steps)
        reads = torch.zeros(B, T + R * steps, T + R * steps, dtype=torch.bool, device=device)
        reads[:, :T, :T] = place[:, None] >= place
        reads[:, T:, :T] = place <= known.repeat_interleave(steps, 1)[..., None]
        reads[:, T:, T:] = own
        mask = additive(reads, self.lm_head.weight.dtype)[:, None]

        hidden, _ = self(torch.cat([tokens, chains.flatten(1)], dim=1), positions, mask=mask)
        row = torch.arange(B, device=device)[:, None]
        first = hidden[row, known][:, :, None]  # (B, R, 1, D)
        later = hidden[:, T:].unflatten(1, (R, steps))  # (B, R, K-1, D)
        return self.logits(torch.cat([first, later], dim=2))


def within(positions, cache):
    """Pads may stand past the cache's end: they go into its last slot, which no token reads."""
    return positions.clamp(max=cache.length - 1)


def is_small_model(path):
    """Whether a file of this project holds a whole language model, and not a head."""
    return "fc.weight" not in load(path)[1]


def load_small_model(path, target):
    """A small model that this project wrote, with the target's vocabulary -> SmallModel."""
    config, weights, _ = load(path)
    same_vocabulary(path, config.vocab_size, target)
    return fill(SmallModel(config), weights, path)


def same_vocabulary(path, size, target):
    wanted = target.config.vocab_size
    if size != wanted:
        raise UserError(f"{path}: the draft's vocabulary is {size!r:.60}, the target's {wanted}: "
                        "they must be the same")
