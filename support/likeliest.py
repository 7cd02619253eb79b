"""Training on stored answers, when a vocabulary is large: of each of the target's distributions
only the likeliest ids, as if it said no others.

The loss of rl.py adds up min(target_p, draft_q) over all ids, which costs more than the draft's own
products, and most of the sum is in few of them.  At temperature 0 it is the same loss, as one id
has it all.  Else the target is cut as by top-k, at serving it is not.

Letters: R rounds, K drafted tokens, N answer tokens, V vocabulary (a pruned draft's, and one),
         M likeliest ids.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.trace import target_side

MOST = 64  # M


@dataclass
class Likeliest:
    """The target's view of each of an answer's places."""

    ids: torch.Tensor  # (N, M) int64, in the draft's vocabulary
    logits: torch.Tensor  # (N, M+1), the last column, -inf, for all the others together
    tokens: torch.Tensor  # (N,) which column the answer's own token is in


@torch.no_grad()
def likeliest(trace, draft, target_head, most=MOST):
    answer = trace.ids[trace.prompt_length :]
    rows, own = target_side(trace, draft, target_head, trace.answer_hidden(), answer)
    logits, ids = rows.float().topk(min(most, rows.shape[-1]), dim=-1)
    columns = torch.cat([ids, own[:, None]], dim=-1)  # so that M is where it is if nowhere else
    place = columns.eq(own[:, None]).int().argmax(-1)
    return Likeliest(ids, F.pad(logits, (0, 1), value=float("-inf")), place)


def of_likeliest(trace, draft, seen, K, places):
    """As support.trace.of_answer, in M+1 columns: what rl.policy_gradient_loss takes."""
    answer = trace.ids[trace.prompt_length :]
    place = places[:, None] + torch.arange(K, device=places.device)  # (R, K)
    beyond, place = place >= len(answer), place.clamp(max=len(answer) - 1)
    starts, fed = places + trace.prompt_length - 2, answer[place][:, :-1]
    logits = draft.replay(trace.features[None], trace.ids[None], starts[None], fed[None])[0]
    T = trace.temperature or 1.0  # at 0 a draft learns at 1
    with torch.autocast(logits.device.type, enabled=False):
        log_q = (logits.float() / T).log_softmax(-1).gather(-1, seen.ids[place])  # (R, K, M)
        rest = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()
    columns = T * torch.cat([log_q, rest], dim=-1)
    return columns, seen.logits[place], seen.tokens[place].masked_fill(beyond, -1)
