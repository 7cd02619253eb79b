"""The pieces of pretrain.py: training, and what drafts learn from.

Letters: B batch rows, T tokens, R round starts, K drafted tokens, H heads, E head width.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain
from draft import Draft
from model import Config, Transformer
from support import precision, training

FALSE_ALARM_7 = 42.7  # chi-square of 7 degrees of freedom is larger with probability 4e-7


# ---- training ------------------------------------------------------------------------------------


def tiny(layers=7, **more):
    torch.manual_seed(0)
    config = dict(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
        bos_token_id=256, suppress_tokens=(256,),
    )
    model = Transformer(Config(**config | more)).eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


class Interrupted(Exception):
    pass


def test_training_resumes_exactly(tmp_path, monkeypatch):
    """Interrupted somewhere between two checkpoints, it ends with the same weights and history."""
    seconds = iter(range(0, 10**6, 8))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))

    def run(path, until=None):
        torch.manual_seed(1)
        model, steps = torch.nn.Linear(4, 4), []

        def batch_loss(step, progress):
            if step == until:
                raise Interrupted
            steps.append(step)
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            return F.mse_loss(model(x), x.flip(1)), x.numel()

        def evaluate():
            return {"norm": model.weight.norm().item()}

        history = None
        with contextlib.suppress(Interrupted):
            history = pretrain.train(model, 20, path, batch_loss, evaluate)
        return model.state_dict(), history, steps

    weights, history, steps = run(tmp_path / "whole.ckpt")
    assert steps == list(range(150)) and len(history) == 10
    assert run(tmp_path / "halves.ckpt", until=100)[2] == list(range(100))
    resumed, again, rest = run(tmp_path / "halves.ckpt")
    assert 0 < rest[0] <= 100 and rest == list(range(rest[0], 150))
    assert again == history
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert run(tmp_path / "whole.ckpt")[1:] == (history, [])  # it is done


def test_what_the_last_quarter_brought():
    history = [{"a": float(i), "b": 1.0} for i in range(9)]
    assert pretrain.last_quarter(history).endswith("a 6.000 -> 8.000, b 1.000 -> 1.000")
    assert pretrain.last_quarter(history[:1]).endswith("a 0.000 -> 0.000, b 1.000 -> 1.000")


@pytest.mark.parametrize("length", [1, 40, 513])
def test_the_attention_to_train_with_is_causal_attention(length):
    """Its values and gradients are those of torch's own, up to bfloat16's rounding."""
    torch.manual_seed(0)
    heads = [torch.randn(2, H, length, 16, requires_grad=True) for H in (4, 2, 2)]
    how = dict(attn_mask=None, is_causal=True, enable_gqa=True)
    grad = torch.randn(2, 4, length, 16)
    results = []
    for attend in (training.attend, F.scaled_dot_product_attention):
        out = attend(*heads, **how)
        results.append((out, *torch.autograd.grad(out, heads, grad.to(out.dtype))))
    for own, exact in zip(*results):
        assert own.shape == exact.shape
        assert (own.float() - exact).norm() <= 0.01 * exact.norm() + 1e-5


# ---- what drafts learn from ----------------------------------------------------------------------


def test_answers_are_draws_from_the_target():
    """Two tokens after one prompt, 4096 times, at temperature 0.8: the first against the target's
    distribution, the second against the mean of those that follow.  False alarms: 1e-6."""
    target = tiny(layers=2, suppress_tokens=tuple(range(8, 257)))
    stream = np.arange(9, dtype=np.uint8)  # room for one stretch of 8 only
    text = pretrain.written(target, stream, 4096, seed=3, prompt=8, answer=2)
    ids = text["ids"]
    assert ids.shape == (4096, 11) and ids[0, :9].tolist() == [256, *range(8)]
    assert (ids[:, :9] == ids[0, :9]).all() and (ids[:, 9:] < 8).all()
    with torch.no_grad():
        hidden, features = target.to(precision.fast_dtype())(ids[:, :-1])
        target_p = (target.logits(hidden[:, -2:])[..., :8].double() / 0.8).softmax(-1)
    for place in (0, 1):
        counts, expected = ids[:, 9 + place].bincount(minlength=8), target_p[:, place].sum(0)
        assert ((counts - expected) ** 2 / expected).sum() < FALSE_ALARM_7
    for stored, whole in ((text["hidden"], hidden), (text["features"], features)):
        assert stored.shape == whole.shape and (stored - whole).norm() < 0.02 * whole.norm()
    other = pretrain.written(target, stream, 4096, 4, prompt=8, answer=2)["ids"]
    assert not torch.equal(ids, other)
    assert len(pretrain.written(target, stream, 130, seed=3, prompt=8, answer=1)["ids"]) == 130


@torch.no_grad()
def test_chains_guess_what_they_have_not_read():
    """Draft and target logits stand beside the token that they are about, and depend on nothing
    from that token on."""
    target, K = tiny(), 4
    draft = Draft(target)
    ids = torch.randint(0, 256, (2, 25), generator=torch.Generator().manual_seed(5))
    starts = torch.tensor([[0, 9, 19], [3, 4, 19]])  # T = 24: the last is T-1-K

    def text(ids):
        hidden, features = target(ids[:, :-1])
        return {"ids": ids, "hidden": hidden, "features": features}

    logits, target_logits, tokens = pretrain.chains(target, draft, text(ids), starts, K)
    hidden = text(ids)["hidden"]
    for r, start in enumerate(starts.flatten().tolist()):
        row = r // 3
        assert tokens[r].tolist() == ids[row, start + 2 : start + 2 + K].tolist()
        view = target.logits(hidden[row, start + 1 : start + 1 + K].float())
        assert torch.allclose(target_logits[r], view, atol=1e-4)
        for k in range(K):
            other = ids.clone()
            other[row, start + 2 + k :] = 255 - other[row, start + 2 + k :]
            changed = pretrain.chains(target, draft, text(other), starts, K)
            assert torch.equal(changed[0][r, : k + 1], logits[r, : k + 1])
            assert torch.equal(changed[1][r, : k + 1], target_logits[r, : k + 1])
            assert k + 1 == K or not torch.equal(changed[0][r, k + 1], logits[r, k + 1])


def test_a_draft_that_is_the_target_is_always_accepted(monkeypatch):
    target, ids = tiny(), torch.randint(0, 256, (2, 100))

    def chains(target, draft, text, starts, K):
        assert starts.min() + 2 == pretrain.PROMPT + 1  # the answer's first token
        assert starts.max() + 2 + K - 1 in (98, 99)  # and as far as there is text
        logits = torch.randn(7, K, 5)
        return logits, logits.clone(), torch.zeros(7, K, dtype=torch.int64)

    monkeypatch.setattr(pretrain, "chains", chains)
    acceptance = pretrain.held_out_acceptance(target, None, {"ids": ids}, 3, "block")
    assert torch.allclose(acceptance, torch.ones(3))
    assert pretrain.length_of(acceptance) == pytest.approx(4)


def test_rounds_start_where_there_is_room_and_in_answers_after_the_prompt():
    K, stream, target = 5, np.zeros(5000, dtype=np.uint8), tiny(max_position_embeddings=1024)
    answers = [{"ids": torch.full((3, 257), c), "hidden": torch.full((3, 256, 32), c).half(),
                "features": torch.full((3, 256, 96), c).half()} for c in (7, 8)]
    for step in range(8):
        text, starts = pretrain.draft_batch(step, target, [stream], answers, K)
        ids, hidden, features = text["ids"], text["hidden"], text["features"]
        assert starts.min() >= 0 and starts.max() + 2 + K - 1 < ids.shape[1]
        assert (starts.diff(dim=1) > 0).all()
        if step < 7:
            assert ids[:, 0].tolist() == [7, 8] * 3 and starts.min() + 2 >= pretrain.PROMPT + 1
            assert hidden[:, -1, -1].tolist() == features[:, 0, 0].tolist() == [7, 8] * 3
        else:
            assert (ids[:, 0] == 256).all() and (ids[:, 1:] == 0).all()
            with torch.no_grad(), training.fast_products():
                expected = target(ids[:, :-1])
            assert torch.allclose(hidden, expected[0], atol=1e-2)
            assert torch.allclose(features, expected[1], atol=1e-2)
