"""What training takes beside a model and its loss: a loop that resumes, the learning rate's way,
and an attention that goes backward fast on a CPU.  Used by pretrain.py.

Letters: B batch rows, T tokens, H heads, G key/value heads, E head width.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from support.optimizers import muon_and_adamw
from support.precision import fast_dtype


def rate(progress):
    """Of the full learning rate: short warm-up, constant, linear decay over the last third."""
    return min(1.0, progress / 0.01 + 0.01) * min(1.0, (1.0 - progress) / 0.33 + 0.01)


def train(model, minutes, checkpoint, batch_loss, evaluate):
    """Runs `minutes` of steps, going on from `checkpoint` if it is there.

    batch_loss(step, progress) -> (loss, bytes), where the step alone seeds what is random.  Every
    tenth of the way evaluate() -> {class: number} is printed and kept.  Returns what it gave."""
    optimizers = muon_and_adamw(model, lr=0.02, weight_decay=0.01)
    full = [o.param_groups[0]["lr"] for o in optimizers]
    step, spent, history, budget = 0, 0.0, [], minutes * 60
    if Path(checkpoint).exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for o, saved in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(saved)
        step, spent, history = state["step"], state["seconds"], state["history"]

    bar = tqdm(total=int(budget), initial=int(spent), unit="s", mininterval=10)
    saved_at = spent
    while spent < budget:
        start, progress = time.perf_counter(), spent / budget
        for o, lr in zip(optimizers, full):
            o.param_groups[0]["lr"] = lr * rate(progress)
        loss, size = batch_loss(step, progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        took = time.perf_counter() - start
        step, spent = step + 1, spent + min(took, 20)  # a compilation is not training time

        bar.update(int(spent) - bar.n)
        bar.set_postfix_str(f"step {step} loss {loss.item():.3f} {size / took:.0f} bytes/s")
        if spent * 10 // budget > len(history):
            history.append(evaluate())
            tqdm.write(f"{spent / 60:.0f} min, step {step}: {history[-1]}")
        if spent - saved_at > 300 or spent >= budget:
            state = {"model": model.state_dict(), "step": step, "seconds": spent}
            state |= {"optimizers": [o.state_dict() for o in optimizers], "history": history}
            torch.save(state, f"{checkpoint}.new")
            Path(f"{checkpoint}.new").replace(checkpoint)
            saved_at = spent
    bar.close()
    return history


def last_quarter(history):
    """What it still brought: where that is little, more minutes would bring little too."""
    then, now = history[int(0.75 * (len(history) - 1))], history[-1]
    moved = ", ".join(f"{kind} {then[kind]:.3f} -> {now[kind]:.3f}" for kind in now)
    return f"last quarter of training: {moved}"


def in_bfloat16(model):
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def fast_products():
    """A context in which products are in `fast_dtype`; weights and losses stay float32."""
    return torch.autocast("cpu", torch.bfloat16, fast_dtype() == torch.bfloat16)


def attend(q, k, v, **how):
    """Causal attention, q (B, H, T, E), k and v (B, G, T, E) -> (B, H, T, E), to train with.

    On a CPU torch's own goes backward in float32.  This one, in bfloat16, is faster where the
    processor multiplies that and the text is short; its scores are T by T numbers."""
    B, H, T, E = q.shape
    if T > 512 or fast_dtype() != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, **how)
    q, k, v = (q * E**-0.5).bfloat16().reshape(B, k.shape[1], -1, E), k.bfloat16(), v.bfloat16()
    scores = (q @ k.transpose(-2, -1)).float()  # (B, G, H/G * T, T)
    later = torch.ones(T, T, dtype=torch.bool).triu(1).repeat(H // k.shape[1], 1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return (weights.bfloat16() @ v).view(B, H, T, E)
