"""A small language model as the draft: it drafts what it would say itself, replays what it
drafted, and comes and goes in both kinds of files."""

import copy

import pytest
import torch

from formats import huggingface, small_model
from formats.export import export_draft
from formats.small_model import SmallModel
from model import Transformer
from support.draft_length import FixedLength
from support.sampling import Sampling
from support.store import fill, save
from tests.test_formats import hf_model, refused
from tests.test_tokens import bpe
from tests.tiny import assert_law, play, request, tiny_draft, tiny_target, uniforms


def tiny_small(seed=5, layers=2, **changes):
    like = tiny_target(seed, gain=2.0, num_hidden_layers=layers, **changes)
    return fill(SmallModel(like.config), like.state_dict(), "here").eval()


def rounds_of(draft, texts, K, laws, count=6, features=3):
    """Plays `count` rounds by hand: the draft reads what was committed, proposes, and a random
    number of its tokens and one more are committed -> per round the starts (B,), tokens (B, K)
    and logits (B, K, V); and the texts as they ended."""
    B, g = len(texts), torch.Generator().manual_seed(3)
    texts, unread, rounds = [list(t) for t in texts], [len(t) - 1 for t in texts], []
    slots = max(map(len, texts)) + count * (K + 1)
    cache, sampling = draft.new_cache(B, slots), Sampling(laws)
    for _ in range(count):
        T = max(unread)
        starts = [len(t) - n - 1 for t, n in zip(texts, unread)]
        tokens = [t[s:] + [0] * (T - n) for t, s, n in zip(texts, starts, unread)]
        positions = (torch.tensor(starts)[:, None] + torch.arange(T)).clamp(max=slots - 1)
        last = torch.tensor(unread) - 1
        drafted, logits, _ = draft.propose(
            torch.randn(B, T, features, generator=g), torch.tensor(tokens), positions, last,
            torch.rand(B, K, dtype=torch.float64, generator=g), sampling, [0.0] * K, cache)
        rounds.append((torch.tensor(starts) + last, drafted, logits))
        kept = torch.randint(0, K + 1, (B,), generator=g).tolist()
        for text, chain, n in zip(texts, drafted.tolist(), kept):
            text += chain[:n] + [int(torch.randint(0, 16, (), generator=g))]
        unread = [n + 1 for n in kept]
    return rounds, texts


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_it_drafts_what_it_would_say_itself(tied, K=4):
    """At temperature 0, after every number of accepted tokens, in a batch of different lengths: the
    K tokens of its own argmax after the committed text.  It looks at no features."""
    draft = tiny_small(tie_word_embeddings=tied)
    texts = [[16, *range(n)] for n in (3, 9, 14)]
    rounds, ended = rounds_of(draft, texts, K, [(0.0, 1.0, 0)] * 3)
    for starts, tokens, _ in rounds:
        for b, start in enumerate(starts.tolist()):
            text = ended[b][: start + 2]
            for token in tokens[b].tolist():
                hidden, _ = draft(torch.tensor([text]))
                assert draft.logits(hidden)[0, -1].argmax() == token
                text = [*text, token]


@torch.no_grad()
def test_a_row_that_fills_the_cache_leaves_room_for_the_others(S=8):
    """Row 0 has one token to read and row 1 four: the pads of row 0 would stand past the end."""
    draft, rows = tiny_small().double(), torch.randint(0, 16, (2, S))
    cache, features = draft.new_cache(2, S), torch.zeros(2, 6, 3)
    first = torch.arange(6).expand(2, -1)
    draft.read(features, rows[:, :7], first, torch.tensor([5, 0]), cache)
    tokens = torch.stack([rows[0, [6, 7, 7, 7]], rows[1, 1:5]])
    where, last = torch.tensor([[6, 7, 7], [1, 2, 3]]), torch.tensor([0, 2])
    _, logits = draft.read(features[:, :3], tokens, where, last, cache)
    for b, length in ((0, 8), (1, 5)):
        alone = draft.logits(draft(rows[b : b + 1, :length])[0])[:, -1]
        torch.testing.assert_close(logits[b], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("K", [1, 4])
@torch.no_grad()
def test_it_replays_what_it_served(K):
    """All rounds of a text at once: the logits that each of its tokens was drawn from."""
    draft = tiny_small().double()
    rounds, ended = rounds_of(draft, [[16, *range(9)], [16, 5, 5]], K, [(1.0, 1.0, 0)] * 2)
    for b, text in enumerate(ended):
        starts = torch.stack([starts[b] for starts, _, _ in rounds])[None]
        chains = torch.stack([tokens[b] for _, tokens, _ in rounds])[None]
        served = torch.stack([logits[b] for _, _, logits in rounds])
        tokens = torch.tensor([text])
        replayed = draft.replay(None, tokens, starts, chains[..., :-1])[0]
        torch.testing.assert_close(replayed, served, atol=1e-10, rtol=0)
        assert replayed[..., 16].isneginf().all(), "what is never said has no probability"
        moved = draft.replay(None, tokens, starts - 1, chains[..., :-1])[0]
        assert (moved - served).nan_to_num().abs().max() > 0.1, "starts did not matter"


def test_replay_has_a_gradient_and_a_clone_its_own_weights():
    draft = tiny_small(tie_word_embeddings=True)
    other = draft.clone()
    assert other.lm_head.weight is other.model.embed_tokens.weight and other.cos is draft.cos
    tokens, starts = torch.randint(0, 16, (2, 9)), torch.tensor([[1, 4], [0, 6]])
    logits = other.replay(None, tokens, starts, torch.randint(0, 16, (2, 2, 3)))
    assert logits.shape == (2, 2, 4, 17)
    logits[..., :16].logsumexp(-1).sum().backward()
    for name, p in other.named_parameters():
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in draft.parameters())


def test_the_law_of_answers_is_the_targets(B=3000, K=2):
    """The first two tokens, over all pairs, at temperature 1.  Chi-square: were the seeds drawn
    anew, a false alarm once in a million."""
    sizes = {"vocab_size": 5, "bos_token_id": 4, "suppress_tokens": (4,)}
    target = tiny_target(gain=2.0, **sizes)
    draft = tiny_small(**sizes)
    asks = [request(length=0, new=3, seed=i) for i in range(B)]
    for ask in asks:
        ask.prompt = [4, 1, 2, 0, 3, 3]
    generation, _ = play(target, draft, asks, FixedLength(K))
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # (16, 2)
    prompt = torch.tensor(asks[0].prompt).expand(16, -1)
    with torch.no_grad():
        hidden, _ = target(torch.cat([prompt, pairs], dim=1))
    p = target.logits(hidden)[:, 5:7].double().softmax(-1)
    p = p.gather(-1, pairs[..., None]).prod(1)[:, 0]
    answers = torch.tensor([text[6:8] for text in generation.text])
    assert_law(torch.bincount(answers[:, 0] * 4 + answers[:, 1], minlength=16), p)


# ---- files ---------------------------------------------------------------------------------------


def test_our_own_file_is_told_from_a_head_and_comes_back(tmp_path):
    target, small = tiny_target(), tiny_small()
    head = tiny_draft(target)
    for name, model in (("small.pt", small), ("head.pt", head)):
        save(tmp_path / name, model.config, model.state_dict(), {})
        assert small_model.is_small_model(tmp_path / name) == (name == "small.pt")
    back = small_model.load_small_model(tmp_path / "small.pt", target)
    assert isinstance(back, SmallModel) and back.config == small.config
    assert all(torch.equal(back.state_dict()[n], t) for n, t in small.state_dict().items())
    with refused("the draft's vocabulary is 17, the target's 21"):
        small_model.load_small_model(tmp_path / "small.pt", tiny_target(vocab_size=21))
    broken = copy.deepcopy(small.state_dict())
    broken["model.norm.weight"][0] = float("nan")
    save(tmp_path / "small.pt", small.config, broken, {})
    with refused("NaN"):
        small_model.load_small_model(tmp_path / "small.pt", target)
    with refused("no checkpoint"):
        small_model.is_small_model(tmp_path / "none.pt")


@torch.no_grad()
def test_what_was_learned_assists_in_transformers(tmp_path):
    """From a directory and out to one: same logits there, the tokenizer beside them, and
    generate(assistant_model=...) says what generate says."""
    transformers = pytest.importorskip("transformers")
    theirs = hf_model(tmp_path / "target", vocab_size=290)
    hf_model(tmp_path / "small", "llama", seed=3, layers=2, vocab_size=290)
    bpe(tmp_path / "small")
    target = huggingface.load_model(tmp_path / "target", torch.float32)
    small = huggingface.load_draft(tmp_path / "small", target)
    assert isinstance(small, SmallModel) and not isinstance(target, SmallModel)
    small.lm_head.weight.add_(0.1 * uniforms(290, 32).float())
    out = tmp_path / "out"
    said = export_draft(small, out, tmp_path / "small", 0.0, target, K=5)
    assert "--speculative-algorithm STANDALONE" in said and '"method": "draft_model"' in said
    assert (out / "tokenizer.json").read_bytes() == (
        tmp_path / "small/tokenizer.json").read_bytes()
    assistant = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(3, 290, (1, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        assistant(ids).logits, small.logits(small(ids)[0]), atol=1e-4, rtol=0)
    plain = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    helped = theirs.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, helped)
    hf_model(tmp_path / "other", "llama", layers=2)
    with refused("the draft's vocabulary is 211, the target's 290"):
        huggingface.load_draft(tmp_path / "other", target)
    assert type(target) is Transformer
