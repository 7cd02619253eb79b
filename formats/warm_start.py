"""A head for your own checkpoint, in one command: it learns from what the checkpoint itself says.

    python -m formats.warm_start --target DIR --prompts FILE --out HEAD
    python aurora.py --target DIR --draft HEAD --prompts FILE

1. The target answers the prompts, many at once.  One in ten is held out.
2. The head's vocabulary: what prompts and answers hold most often.
3. A head of random weights is trained on the answers, as pretrain.py trains the shipped ones.

HEAD is an EAGLE-3 directory, as SGLang and vLLM read it, with record.json: what it was made of, and
the tokens a round to expect of it on answers that were held out.  The answers stay in HEAD.work; a
run that was ended goes on there.

Letters: B batch rows, T tokens, K drafted tokens a round, V vocabulary.
"""

import argparse
import hashlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from draft import Draft
from formats.export import write_head
from formats.find import find_target
from formats.pruned import common_ids
from generation import Generation, Request
from learner import expected_length
from model import TargetHead, UserError
from rl import policy_gradient_loss
from support import chat_traffic, options
from support.command import command
from support.draft_length import Plan
from support.likeliest import likeliest, of_likeliest
from support.precision import ready_to_serve
from support.store import write
from support.trace import Trace
from support.training import fast_products, train

HELD_OUT = 10  # of so many prompts of a class, one
GLANCE = 2  # held-out answers a class that are looked at during training
ANSWERS, PLACES = 4, 64  # of a step; round starts in each of them


@dataclass
class Question:
    kind: str  # its class
    held_out: bool
    ids: list
    temperature: float
    seed: int


# ---- answers -------------------------------------------------------------------------------------


def prompts_of(args):
    """-> [(class, whether it is held out, text or messages)]"""
    user, rows, seen = chat_traffic.user_says, [], Counter()
    if args.prompts:
        for kind, said in options.read_prompts(args.prompts):
            seen[kind] += 1
            said = user(said) if args.chat and isinstance(said, str) else said
            rows.append((kind, seen[kind] % HELD_OUT == 0, said))
        return rows
    for kind in args.traffic.split(","):
        for split, count in (("train", args.requests), ("eval", -(-args.requests // HELD_OUT))):
            texts = chat_traffic.prompts_of(kind, split, count, args.seed)
            rows += [(kind, split == "eval", user(text)) for text in texts]
    return rows


def questions(args, tokenizer, context):
    """What the target is asked, in batches of prompts about as long: [[Question]], in an order that
    has something of everything from the start."""
    rows, found, asked = prompts_of(args), [], Counter()
    for i, (kind, held_out, said) in enumerate(rows):
        ids = options.encode(said, tokenizer)
        if len(ids) + args.max_new_tokens <= context:
            temperature = args.temperatures[asked[kind, held_out] % len(args.temperatures)]
            asked[kind, held_out] += 1
            found.append(Question(kind, held_out, ids, temperature, args.seed * 1_000_003 + i))
    if len(rows) > len(found):
        print(f"{len(rows) - len(found)} prompts are too long for the context of {context}")
    if not any(q.held_out for q in found) or all(q.held_out for q in found):
        raise UserError(f"{len(found)} prompts that fit are too few: one in {HELD_OUT} of each "
                        "class is held out, and the others are learned from")
    found.sort(key=lambda q: len(q.ids))
    groups = [found[i : i + args.rows] for i in range(0, len(found), args.rows)]
    random.Random(args.seed).shuffle(groups)
    return groups


def ask(target, group, new):
    """-> the Trace of what the target says to each of them, up to `new` tokens."""
    requests = [Request(q.ids, new, q.seed, q.temperature, q.kind) for q in group]
    generation = Generation(target, None, requests)
    while not generation.done:
        drafted = generation.draft_tokens(Plan())
        generation.commit(drafted, *generation.verify(drafted))
    return [generation.trace(b) for b in range(len(group))]


def foretell(target, groups, new):
    """Seconds that the answers will take: a prompt and a few tokens of a batch are timed."""
    group = groups[0]
    start = time.perf_counter()
    ask(target, group, 2)
    read = time.perf_counter()
    ask(target, group, 10)
    step = max(0.0, time.perf_counter() - read - (read - start)) / 8
    tokens = sum(len(q.ids) for g in groups for q in g)
    per_token = (read - start - 2 * step) / sum(len(q.ids) for q in group)
    return max(0.0, tokens * per_token) + len(groups) * new * step


def answers(args, target, groups, folder):
    """Files of what was said, one a batch; those that are there are not said again.
    -> [(Question, Trace)]; their tensors are mapped, and read when they are used."""
    files = [folder / f"answers-{i:05d}.pt" for i in range(len(groups))]
    left = [(g, f) for g, f in zip(groups, files) if not f.exists()]
    until = time.monotonic() + 60 * args.answer_minutes
    if left:
        minutes = foretell(target, [g for g, _ in left], args.max_new_tokens) / 60
        print(f"{sum(len(g) for g, _ in left)} answers of up to {args.max_new_tokens} tokens: "
              f"about {minutes:.0f} minutes; then {args.minutes:g} minutes of training", flush=True)
    with tqdm(total=sum(map(len, groups)), unit="answer", mininterval=5) as bar:
        bar.update(bar.total - sum(len(g) for g, _ in left))
        bar.unpause()
        for group, file in left:
            if time.monotonic() > until:
                break
            start = time.perf_counter()
            traces = ask(target, group, args.max_new_tokens)
            write(file, [vars(trace) for trace in traces])
            said = sum(len(t.ids) - t.prompt_length for t in traces)
            bar.set_postfix_str(f"{said / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(group))
    pairs = []
    for group, file in zip(groups, files):
        if not file.exists():  # there was no time for it
            continue
        stored = torch.load(file, weights_only=True, mmap=True)
        pairs += [(q, Trace(**fields)) for q, fields in zip(group, stored, strict=True)]
    return pairs


# ---- the head ------------------------------------------------------------------------------------


def vocabulary_of(config, traces, size):
    """-> the commonest ids (size,), of prompts too, as those tell what other answers may say; None
    for all."""
    if not size or size >= config.vocab_size:
        return None
    ids = torch.cat([trace.ids for trace in traces])
    return common_ids(config, size, torch.bincount(ids, minlength=config.vocab_size))


def covered(vocabulary, traces):
    """The share of what the answers say that is in the vocabulary."""
    said = torch.cat([trace.ids[trace.prompt_length :] for trace in traces])
    return 1.0 if vocabulary is None else torch.isin(said, vocabulary).float().mean().item()


def lengths(draft, target_head, pairs, K, most=None):
    """{class, temperature: tokens a round to expect by the block rule}, of at most `most` answers
    each."""
    found = {}
    for q, trace in pairs:
        found.setdefault(f"{q.kind} T={q.temperature:g}", []).append(trace)
    out = {}
    for name, traces in sorted(found.items()):
        with fast_products():
            each = [expected_length(draft, t, target_head, K, "block") for t in traces[:most]]
        out[name] = round(mean(each), 3)
    return out


def train_head(args, target, draft, pairs, checkpoint):
    """-> held-out tokens a round as training went on, {class: number} each time."""
    target_head, K = TargetHead(target), args.num_speculative_tokens
    learned = [trace for q, trace in pairs if not q.held_out]
    held_out = [(q, trace) for q, trace in pairs if q.held_out]

    thoughts = [None] * len(learned)  # the target's, of each answer; once

    def loss_of(i, generator):
        trace = learned[i]
        thoughts[i] = thoughts[i] or likeliest(trace, draft, target_head)
        answer = len(trace.ids) - trace.prompt_length
        places = torch.randperm(answer, generator=generator)[:PLACES].sort().values
        with fast_products():
            sides = of_likeliest(trace, draft, thoughts[i], K, places)
        return policy_gradient_loss(*sides, trace.temperature, "log", "target", "block")

    def batch_loss(step, progress):
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(learned), (ANSWERS,), generator=generator).tolist()
        total = sum(loss_of(i, generator) for i in picks) / ANSWERS
        return total, sum(len(learned[i].ids) for i in picks)

    def evaluate():
        return lengths(draft, target_head, held_out, K, GLANCE)

    history = train(draft, args.minutes, checkpoint, batch_loss, evaluate)
    return history, lengths(draft, target_head, held_out, K)


# ---- the command ---------------------------------------------------------------------------------


def arguments(argv=None):
    parser = options.Parser(
        prog="python -m formats.warm_start", description="A head for your own checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--target", required=True, metavar="DIR|NAME", help="what the head is for")
    add("--out", required=True, metavar="HEAD", help="that is not there yet")
    add("--prompts", metavar="FILE", help="a prompt a line, or .jsonl with prompt and class")
    add("--chat", action="store_true", help="put --prompts into the checkpoint's chat template")
    add("--traffic", default=",".join(chat_traffic.CLASSES),
        help="without --prompts: classes of support/chat_traffic.py, always as chat")
    add("--requests", type=options.whole(10), default=400, help="of each class of --traffic")
    add("--max-new-tokens", type=options.whole(2), default=128)
    add("--temperatures", type=options.temperature, nargs="+", default=[0.0, 0.7], metavar="T",
        help="that serve, by turns")
    add("--rows", type=options.whole(1), default=64, help="answers at once")
    add("--answer-minutes", type=options.real(0, 1e5), default=1e5, metavar="MINUTES",
        help="after which no more answers are begun")
    add("--minutes", type=options.real(0.01, 1e5), default=45, help="of training")
    add("--draft-vocab", type=options.whole(0), default=8192, metavar="N",
        help="ids that the head can say; 0 is all")
    add("--num-speculative-tokens", type=options.whole(1, 64), default=5, metavar="K",
        help="tokens a round that it is trained for")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the target")
    add("--seed", type=options.whole(0), default=0)
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists: name a directory that is not there yet")
    return args


def main(argv=None):
    args = arguments(argv)
    torch.set_flush_denormal(True)  # numbers under 1e-38 take a processor far longer
    torch.manual_seed(args.seed)
    target, tokenizer = find_target(args.target, args.dtype)
    target = ready_to_serve(target, "cpu", args.dtype)
    folder = Path(f"{args.out}.work")
    groups = questions(args, tokenizer, target.config.max_position_embeddings)
    same_as_before(args, groups, folder)
    pairs = answers(args, target, groups, folder)
    learned = [trace for q, trace in pairs if not q.held_out]
    vocabulary = vocabulary_of(target.config, learned, args.draft_vocab)
    share = covered(vocabulary, [trace for q, trace in pairs if q.held_out])
    draft = Draft(target, vocabulary=vocabulary)
    print(f"a head of {sum(p.numel() for p in draft.parameters()) / 1e6:.1f}M parameters, whose "
          f"vocabulary has {share:.1%} of what held-out answers say", flush=True)
    history, final = train_head(args, target, draft, pairs, folder / "training.ckpt")
    record = {
        "tokens_a_round": final, "chain": args.num_speculative_tokens, "rule": "block",
        "learned_from": {"answers": len(learned), "tokens": sum(len(x.committed) for x in learned)},
        "held_out": len(pairs) - len(learned), "minutes": args.minutes,
        "vocabulary_covers": round(share, 4), "history": history,
    }
    write_head(draft.bfloat16(), args.out, target, record)
    print(f"tokens a round on held-out answers, K = {args.num_speculative_tokens}: "
          + ", ".join(f"{name} {x:.2f}" for name, x in final.items()))
    print(f"python aurora.py --target {args.target} --draft {args.out} --prompts FILE")


def same_as_before(args, groups, folder):
    """The answers in the folder are to these questions, or it is an error."""
    made_of = "\n".join(f"{args.max_new_tokens} {q.temperature} {q.ids}"
                        for group in groups for q in group)
    content = f"{args.target} {hashlib.sha256(made_of.encode()).hexdigest()}\n"
    path = folder / "questions"
    if path.exists() and path.read_text() != content:
        raise UserError(f"{folder} holds answers to other questions: name another --out, or delete "
                        "that folder")
    write(path, content)


if __name__ == "__main__":
    command(main, "formats.warm_start")
