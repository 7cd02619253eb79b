"""What one request leaves behind: all that the learner needs, so that it never runs the target.

The learner sees a trace from two sides.  Rounds as served: what the draft proposed, kept and
rejected.  Or the answer: the target's own tokens, as if a round had started anywhere in it.

Top-k and top-p cut the target and the draft before acceptance, and the law of acceptance is that of
what is left.  For the draft with gradient one thing is different: an id that its own cut dropped
but the target's kept is given back to it.  Its probability would be 0 with no gradient, so it could
hardly return.  Where the draft's cut keeps all that the target's keeps, the gradient is that of the
law that served; elsewhere it is biased, as the draft could not have drawn what it is given back.

Letters: T tokens of the text, R rounds, K drafted tokens, N answer tokens, V vocabulary, D width.
"""

from dataclasses import dataclass

import torch

from support.sampling import Sampling


@dataclass
class Trace:
    ids: torch.Tensor  # (T+1,) prompt and answer
    prompt_length: int  # tokens, the begin token included
    features: torch.Tensor  # (T, 3D) the target's, at every position but the last
    starts: torch.Tensor  # (R,) position of each round's step 0
    draft_tokens: torch.Tensor  # (R, K) what the draft proposed, -1 pads; none from the memory
    behaviour: torch.Tensor  # (R, K) log draft_q(token) when it was drafted
    hidden: torch.Tensor  # (R, K+1, D) the target's, after its norm; off the path too
    committed: torch.Tensor  # (R,) tokens that the round added to the answer
    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    def drafted(self):
        """(R,) bool: the rounds in which the draft proposed anything."""
        return (self.draft_tokens >= 0).any(1)

    def answer_hidden(self):
        """(N, D): the target's view of each of the answer's tokens."""
        row = torch.arange(self.hidden.shape[1], device=self.hidden.device)
        return self.hidden[row < self.committed[:, None]]

    def sampling(self):
        return Sampling([(self.temperature, self.top_p, self.top_k)], self.ids.device)


def of_rounds(trace, draft, target_head, rounds):
    """The rounds (R,) as they were served -> the draft's logits (R, K, V), replayed with gradient
    and not cut; the target's, as it served; the drafted tokens (R, K).  All in the draft's
    vocabulary.  target_head: the target's, (.., D) -> logits (.., V)."""
    tokens = trace.draft_tokens[rounds]
    starts, fed = trace.starts[rounds], tokens[:, :-1].clamp(min=0)
    hidden = trace.hidden[rounds, : tokens.shape[1]]
    logits = draft.replay(trace.features[None], trace.ids[None], starts[None], fed[None])
    target_logits, tokens = target_side(trace, draft, target_head, hidden, tokens)
    return logits[0], target_logits, tokens


def of_answer(trace, draft, target_head, K, places):
    """As if rounds had started at these places (R,) of the answer and the target's own tokens had
    been drafted -> as of_rounds, tokens -1 past the answer's end."""
    answer = trace.ids[trace.prompt_length :]
    rows, own = target_side(trace, draft, target_head, trace.answer_hidden(), answer)
    place = places[:, None] + torch.arange(K, device=places.device)  # (R, K)
    beyond, place = place >= len(answer), place.clamp(max=len(answer) - 1)
    starts, fed = places + trace.prompt_length - 2, answer[place][:, :-1]
    logits = draft.replay(trace.features[None], trace.ids[None], starts[None], fed[None])
    return logits[0], rows[place], own[place].masked_fill(beyond, -1)


@torch.no_grad()
def target_side(trace, draft, target_head, hidden, tokens):
    """hidden (N, .., D), tokens -> the target's logits (N, .., V) as they served, and the tokens.

    A pruned draft gets V_draft + 1 columns, the last one for all the other ids together: after
    softmax the target's probabilities on the draft's own ids are as large as before."""
    vocabulary, T = draft.vocabulary, trace.temperature
    with torch.autocast(hidden.device.type, enabled=False):  # what the target said is not rounded
        logits = trace.sampling().filter(target_head(hidden))
    if vocabulary is None:
        return logits, tokens
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = logits.index_fill(-1, vocabulary, float("-inf"))
    rest = T * (others / T).logsumexp(-1) if T > 0 else others.amax(-1)
    place = torch.searchsorted(vocabulary, tokens).clamp(max=len(vocabulary) - 1)
    own = torch.where(vocabulary[place] == tokens, place, len(vocabulary))
    logits = torch.cat([logits[..., vocabulary], rest[..., None]], dim=-1)
    return logits, torch.where(tokens >= 0, own, -1)


def give_back(draft_logits, target_logits, trace):
    """The draft's logits (R, K, V) to learn from: cut as they served, but nothing that the target
    kept is cut."""
    sampling = trace.sampling()
    if not sampling.cuts:
        return draft_logits
    cut = sampling.filter(draft_logits.detach()).isneginf() & target_logits.isneginf()
    return draft_logits.masked_fill(cut, float("-inf"))
