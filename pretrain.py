"""How the shipped weights were made, from the text of support/corpus.py.

    python pretrain.py --corpus                      what the text is made of on this machine
    python pretrain.py --target                      train weights/target.pt
    python pretrain.py --answers answers.pt          what the target writes after training text
    python pretrain.py --draft python,cpp,docs --with answers.pt       train weights/draft.pt
    python pretrain.py --draft python --with answers.pt --out weights/draft-python.pt
    python pretrain.py --eval                        what is shipped, on held-out text

Training resumes from its checkpoint file.  With glibc, MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=20000000000 save time: large blocks are kept, not mapped anew at every step.

Letters: B batch rows, T tokens, R round starts a row, K drafted tokens, V vocabulary,
         H heads, G key/value heads, E head width.
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import rl
from draft import Draft, load_draft
from model import Attention, Config, Transformer
from support.command import command
from support.corpus import BOS, CLASSES, as_bytes, corpus, print_corpus, record, sample, windows
from support.options import real
from support.precision import fast_dtype
from support.sampling import inverse_cdf, probabilities
from support.store import load_target, save
from support.training import attend, fast_products, in_bfloat16, last_quarter, train

WEIGHTS = Path(__file__).parent / "weights"
TEMPERATURE = 0.8  # at which drafts are trained and measured, aurora.py's default
PROMPT, ANSWER = 64, 192  # bytes of text, and what the target writes after them
HELD_OUT = 96  # answers a class that drafts are measured on
BATCH = 8192  # bytes a step of the target
LENGTHS = ((0.55, 256), (0.75, 512), (0.95, 1024), (1.0, 2048))  # bytes of a sequence, until when
TARGET = Config(
    vocab_size=257, hidden_size=256, intermediate_size=768, num_hidden_layers=24,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    bos_token_id=BOS, suppress_tokens=(BOS,),
)


# ---- the target ----------------------------------------------------------------------------------


def next_byte_loss(model, ids):
    """Mean negative log-likelihood, nats per byte."""
    with fast_products():
        hidden, _ = model(ids[:, :-1])
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model, stream, count=24, length=2048):
    """Held-out bits per byte, every window from an empty context."""
    losses = [next_byte_loss(model, row[None]).item() for row in windows(stream, count, length)]
    return sum(losses) / len(losses) / math.log(2)


def train_target(args, texts):
    torch.manual_seed(0)
    streams = [as_bytes(texts[kind]["train"]) for kind in CLASSES]
    held_out = {kind: as_bytes(texts[kind]["eval"]) for kind in CLASSES}
    model = Transformer(TARGET)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(p)  # a layer begins as the identity
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
    loss_fn = torch.compile(next_byte_loss, dynamic=False)

    def batch_loss(step, progress):
        length = next(length for until, length in LENGTHS if progress < until)
        ids = sample(streams, BATCH // length, length, np.random.default_rng(step))
        return loss_fn(model, ids), ids.numel()

    def evaluate():
        return {kind: round(bits_per_byte(model, held_out[kind], count=6), 3) for kind in CLASSES}

    history = train(model, args.minutes, args.checkpoint, batch_loss, evaluate)
    kept = record(texts, bits_per_byte=history, minutes=args.minutes)
    save(args.out, TARGET, in_bfloat16(model), kept)
    print("bits per byte,", last_quarter(history))


# ---- the drafts ----------------------------------------------------------------------------------


@torch.no_grad()
def written(target, stream, count, seed, prompt=PROMPT, answer=ANSWER):
    """The begin token, a stretch of text, and what the target goes on to write at TEMPERATURE:
    ids (count, T+1) int64, T = prompt + answer, with what it thought: hidden (count, T, D) and
    features (count, T, 3D), float16."""
    target, rng = copy.deepcopy(target).to(fast_dtype()), np.random.default_rng(seed)
    generator, batch, out = torch.Generator().manual_seed(seed), min(count, 128), []
    temperature = torch.full((batch,), TEMPERATURE, dtype=torch.float64)
    positions = torch.arange(prompt + answer).expand(batch, -1)
    for _ in tqdm(range(-(-count // batch)), unit="batch", leave=False):
        ids, cache = sample([stream], batch, prompt, rng), target.new_cache(batch, prompt + answer)
        thoughts = [target(ids[:, :prompt], positions[:, :prompt], cache)]
        for t in range(prompt, prompt + answer):
            hidden, features = target(ids[:, t:], positions[:, t : t + 1], cache)
            thoughts.append((hidden, features))
            target_p = probabilities(target.logits(hidden[:, 0]), temperature)
            coins = torch.rand(batch, generator=generator, dtype=torch.float64)
            ids = torch.cat([ids, inverse_cdf(target_p, coins)[:, None]], dim=1)
        out.append((ids, *(torch.cat(x, dim=1).half() for x in zip(*thoughts))))
    ids, hidden, features = (torch.cat(x)[:count] for x in zip(*out))
    return {"ids": ids, "hidden": hidden, "features": features}


def chains(target, draft, text, starts, K):
    """The draft as if rounds had started at `starts` (B, R), at most T-1-K, and the text's own next
    tokens had been drafted.  text: as of `written`.

    Returns draft logits (B*R, K, V), target logits (B*R, K, V) and tokens (B*R, K)."""
    place = starts[..., None] + 2 + torch.arange(K)  # (B, R, K): the tokens that are guessed
    row = torch.arange(len(starts))[:, None, None]
    tokens = text["ids"][row, place]
    with fast_products():
        draft_logits = draft.replay(text["features"], text["ids"], starts, tokens[..., :-1])
    with torch.no_grad():
        target_logits = target.logits(text["hidden"].float())[row, place - 1]
    draft_logits = draft_logits.float()
    return draft_logits.flatten(0, 1), target_logits.flatten(0, 1), tokens.flatten(0, 1)


@torch.no_grad()
def held_out_acceptance(target, draft, text, K, rule):
    """Acceptance at each place of the chain, given that it is reached: (K,).  text: what the target
    wrote after held-out text.  Its tokens are draws from target_p, so this is what serving would
    accept if rounds had started all over the answer."""
    starts = torch.arange(PROMPT - 1, text["ids"].shape[1] - 1 - K, 2)
    starts = starts.expand(len(text["ids"]), -1)
    return rl.acceptance(*chains(target, draft, text, starts, K), TEMPERATURE, rule)


def length_of(acceptance):
    return round(1 + acceptance.cumprod(0).sum().item(), 4)


def answers_to(texts, split, target, count, seed):
    """{class: what the target writes after text of this split}"""
    streams = {kind: as_bytes(texts[kind][split]) for kind in CLASSES}
    return {kind: written(target, stream, count, seed) for kind, stream in streams.items()}


def draft_batch(step, target, streams, answers, K):
    """The text of a step, as of `written`, and its round starts (B, R).

    Rounds start in what the target wrote, where the loss is the objective; its thoughts are stored,
    and cost nothing.  One step in eight reads text far back: tokens that are not the target's own,
    which say no more than after which prefixes, and how far back, the draft should be right."""
    rng = np.random.default_rng(step)
    if step % 8 == 7 or not answers:
        rows, length, first, R = 2, 1024, 0, 256
        ids = sample(streams, rows, length, rng)
        with torch.no_grad(), fast_products():
            hidden, features = target(ids[:, :-1])
        text = {"ids": ids, "hidden": hidden, "features": features}
    else:
        rows, length, first, R = 6, PROMPT + ANSWER, PROMPT - 1, 128
        kinds = [answers[row % len(answers)] for row in range(rows)]
        picks = [rng.integers(len(kind["ids"])) for kind in kinds]
        text = {name: torch.stack([kind[name][i] for kind, i in zip(kinds, picks)])
                for name in ("ids", "hidden", "features")}
    starts = [first + rng.permutation(length - K - first)[:R] for _ in range(rows)]
    return text, torch.from_numpy(np.sort(starts))


def train_draft(args, texts, classes):
    """Offline, at the temperature that serves, on text of `classes` and, where --with gives it, on
    what the target itself wrote after such text, which is what serving will read."""
    torch.manual_seed(0)
    target = load_target(args.target_path)[0].eval()
    streams = [as_bytes(texts[kind]["train"]) for kind in classes]
    answers = torch.load(args.answered, weights_only=True, mmap=True) if args.answered else {}
    answers = [answers[kind] for kind in classes if kind in answers]
    held_out, K, rule = answers_to(texts, "eval", target, HELD_OUT, 1), args.chain, args.rule
    draft, before = load_draft(args.init, target) if args.init else (Draft(target), {})

    def batch_loss(step, progress):
        text, starts = draft_batch(step, target, streams, answers, K)
        logits = chains(target, draft, text, starts, K)
        loss = rl.policy_gradient_loss(*logits, TEMPERATURE, args.objective, "target", rule)
        return loss, text["ids"].numel()

    def evaluate():
        out = {}
        for kind, text in held_out.items():
            out[kind] = length_of(held_out_acceptance(target, draft, text, K, rule))
        return out

    history = train(draft, args.minutes, args.checkpoint, batch_loss, evaluate)
    kept = record(
        texts, acceptance_length=history, classes=classes, objective=args.objective, rule=rule,
        chain=K, minutes=args.minutes + before.get("minutes", 0),
    )
    save(args.out, draft.config, in_bfloat16(draft), kept)
    print("acceptance length,", last_quarter(history))


def evaluate_shipped(args, texts):
    target, kept = load_target(args.target_path)
    for kind in CLASSES:
        bits = bits_per_byte(target.eval(), as_bytes(texts[kind]["eval"]))
        print(f"target {kind}: {bits:.3f} bits per byte")
    print(f"target, {last_quarter(kept['bits_per_byte'])}")
    held_out = answers_to(texts, "eval", target, HELD_OUT, 1)
    for name in ("draft", "draft-python"):
        draft, kept = load_draft(WEIGHTS / f"{name}.pt", target)
        for kind, text in held_out.items():
            acceptance = held_out_acceptance(target, draft, text, args.chain, args.rule)
            each = " ".join(f"{x:.3f}" for x in acceptance.tolist())
            print(f"{name} {kind}: acceptance {each}, length {length_of(acceptance):.3f}")
        print(f"{name}, {last_quarter(kept['acceptance_length'])}")


# ---- the command ---------------------------------------------------------------------------------


def arguments():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", action="store_true")
    what.add_argument("--target", action="store_true")
    what.add_argument("--answers", metavar="FILE", help="write what the target writes after text")
    what.add_argument("--draft", metavar="CLASSES", help="python,cpp,docs or some of them")
    what.add_argument("--eval", action="store_true")
    add = parser.add_argument
    add("--minutes", type=real(0.1, 1e5), default=75)
    add("--out", help="the file to write; by default what aurora.py reads")
    add("--checkpoint", help="where training resumes from; by default --out and .ckpt")
    add("--target-path", default=WEIGHTS / "target.pt")
    add("--count", type=int, default=1536, help="answers a class")
    add("--with", dest="answered", metavar="FILE", help="train the draft on these answers too")
    add("--init", metavar="FILE", help="go on from this draft instead of random weights")
    add("--objective", choices=("log", "expected", "kl"), default="log", help="of the draft")
    add("--rule", choices=("block", "token"), default="block", help="of acceptance")
    add("--chain", type=int, default=5, help="tokens a round that the draft is trained for")
    args = parser.parse_args()
    args.out = args.out or WEIGHTS / ("target.pt" if args.target else "draft.pt")
    args.checkpoint = args.checkpoint or f"{args.out}.ckpt"
    for kind in args.draft.split(",") if args.draft else ():
        if kind not in CLASSES:
            parser.error(f"--draft {args.draft}: expected some of {','.join(CLASSES)}")
    for path in (args.answered, args.init):
        if path and not Path(path).is_file():
            parser.error(f"there is no file {path}")
    for path in (args.answers, args.out):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"cannot write {path}: its directory does not exist")
    return args


def main():
    args, texts = arguments(), corpus()
    torch.set_flush_denormal(True)  # numbers under 1e-38 take a processor far longer
    print_corpus(texts)
    if args.target:
        train_target(args, texts)
    if args.answers:
        target = load_target(args.target_path)[0].eval()
        torch.save(answers_to(texts, "train", target, args.count, 0), args.answers)
    if args.draft:
        train_draft(args, texts, args.draft.split(","))
    if args.target or args.draft:
        Path(args.checkpoint).unlink()  # the next run is another training
    if args.eval:
        evaluate_shipped(args, texts)


if __name__ == "__main__":
    command(main, "pretrain")
