"""Ours against transformers' generation: plain, and speculative where it has such a draft.

    python -m bench.against_transformers DIR --draft memory      against its prompt lookup
    python -m bench.against_transformers DIR --draft SMALL       against its assisted generation
    python -m bench.against_transformers DIR --draft HEAD        it has no such draft: plain alone

Greedy, the same checkpoint, draft, K, dtype, threads and prompts for every arm.  A turn is one
prompt, which the arms answer one after the other, each turn in another order.  A ratio is taken
within a turn; what is printed is the median of the turns, with quartiles, and in how many turns
the arms did not all give the same answer: none in float32, but for ties.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from aurora import Arm
from formats.files import locate, need
from formats.huggingface import load_draft, load_target
from formats.small_model import SmallModel
from generation import Request
from model import UserError, by_columns
from support.command import command
from support.draft_length import HEAD, REQUEST, FixedLength
from support.options import read_prompts

PROMPT = (9, 128)  # tokens: shorter prompts are left out, longer ones cut
MEMORY = "memory"  # what followed before in the text itself, instead of a draft
RATIOS = (
    ("ours plain", "theirs plain"), ("ours speculative", "theirs speculative"),
    ("ours speculative", "ours plain"), ("ours speculative", "theirs plain"),
    ("theirs speculative", "theirs plain"),
)


@dataclass
class Ours:
    """An arm of ours, as a function from token ids to an answer."""

    target: object
    arm: Arm
    new: int  # tokens of an answer
    rounds: list = field(default_factory=list)

    def __call__(self, ids):
        served = self.arm.serve(self.target, Request(ids, self.new, 0, 0.0))
        self.rounds += served.generation.rounds[0]
        return served.generation.answer()

    def acceptance_length(self):
        return 1 + sum(r.accepted for r in self.rounds) / len(self.rounds)


def theirs(model, new, do_sample=False, **more):
    """The same, of transformers'."""

    def answer(ids):
        ids = torch.tensor([ids])
        out = model.generate(ids, max_new_tokens=new, do_sample=do_sample, **more)
        return out[0, ids.shape[1] :].tolist()

    return answer


def arms_of(args, target, draft, transformers):
    """draft: None for the memory -> {name: function from ids to an answer}"""
    K, dtype, new = args.num_speculative_tokens, target.lm_head.weight.dtype, args.max_new_tokens

    def model_of(name, **settings):
        path = locate(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        model.generation_config.update(eos_token_id=None, pad_token_id=0, **settings)
        return model

    assisted = {} if draft else {"prompt_lookup_num_tokens": K}
    if isinstance(draft, SmallModel):
        assistant = model_of(
            args.draft, num_assistant_tokens=K, num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0)
        assisted = {"assistant_model": assistant}
    length = FixedLength(K, HEAD if draft else REQUEST)
    model = model_of(args.checkpoint)
    arms = {
        "ours plain": Ours(target, Arm(), new),
        "theirs plain": theirs(model, new),
        "ours speculative": Ours(target, Arm(draft, length, own_memory=draft is None), new),
    }
    if assisted:
        arms["theirs speculative"] = theirs(model, new, **assisted)
    return arms


def measure(arms, prompts, turns):
    """-> {arm: tokens/s of each turn}, and in how many turns the answers differed."""
    speeds, differ, names = {name: [] for name in arms}, 0, list(arms)
    for turn in range(-1, turns):  # the one before the first warms up
        answers, first = {}, turn % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            answers[name] = arms[name](prompts[turn % len(prompts)])
            if turn >= 0:
                speeds[name].append(len(answers[name]) / (time.perf_counter() - begun))
        differ += turn >= 0 and any(a != answers["theirs plain"] for a in answers.values())
    return speeds, differ


def show(name, values):
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(quartiles).tolist()
    print(f"{name:40s} {median:8.2f}   (quartiles {low:.2f} to {high:.2f})")


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.against_transformers", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", metavar="DIR|NAME")
    parser.add_argument("--draft", default=MEMORY, metavar="memory|DIR|NAME")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line",
                        default=str(Path(__file__).parent.parent / "README.md"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    for name in ("num_speculative_tokens", "max_new_tokens", "turns", "threads"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv=None):
    args = arguments(argv)
    texts = [text for _, text in read_prompts(args.prompts)]
    transformers = need("transformers", "the comparison", "requirements-test.txt")
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    target, tokenizer = load_target(args.checkpoint, dtype)
    target.eval().config.eos_token_ids = ()  # every answer has its full length, in every arm
    draft = None if args.draft == MEMORY else load_draft(args.draft, target).to(dtype).eval()
    models = [model for model in (target, draft) if model]
    for model in models:
        by_columns(model)
    context = min(model.config.max_position_embeddings for model in models)
    longest = max(0, min(PROMPT[1], context - args.max_new_tokens))
    prompts = [tokenizer.encode(text)[:longest] for text in texts]
    prompts = [ids for ids in prompts if len(ids) >= PROMPT[0]]
    if not prompts:
        raise UserError(f"{args.prompts}: no prompt of {PROMPT[0]} tokens or more that fits, with "
                        f"--max-new-tokens, into the context of {context}")
    arms = arms_of(args, target, draft, transformers)
    speeds, differ = measure(arms, prompts, args.turns)
    length = arms["ours speculative"].acceptance_length()
    print(f"{args.checkpoint}, draft {args.draft}, K = {args.num_speculative_tokens}, "
          f"{args.dtype}, {args.threads} threads, {args.turns} turns of {args.max_new_tokens} "
          f"tokens, greedy; acceptance length {length:.2f}; answers differ in {differ} turns")
    for name, values in speeds.items():
        show(f"{name}, tokens/s", values)
    for over, under in RATIOS:
        if over in speeds and under in speeds:
            pairs = zip(speeds[over], speeds[under])
            show(f"{over} / {under}", [x / y for x, y in pairs])


if __name__ == "__main__":
    command(main, "against_transformers")
