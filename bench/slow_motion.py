"""python verify.py: one round of speculative decoding in slow motion, under both rules.

A real one: the shipped target and draft answer a prompt, and the first round is shown in which,
with the same coins, the block rule keeps more than the token rule.
"""

import argparse

import torch

import aurora
from formats.find import find_draft, find_target
from generation import Generation
from support import options
from support.draft_length import HEAD, Plan
from support.precision import ready_to_serve
from support.sampling import probabilities
from verify import accept_one, keep_block, keep_tokens

K = 4


def rounds(target, draft, tokenizer, args):
    """Serves -> yields the answer so far and the round: target_p, draft_q, tokens, coins."""
    ids = options.encode(args.prompt, tokenizer)
    request = aurora.Request(ids, args.max_new_tokens, args.seed, args.temperature)
    generation = Generation(target, draft, [request])
    while not generation.done:
        drafted = generation.draft_tokens(Plan(HEAD, K, [0.0] * K))
        answer = generation.answer()
        accepted, own, (hidden, features) = generation.verify(drafted)
        law = generation.sampling.temperature[:, None]
        if drafted.tokens.shape[1] == K:
            target_p = probabilities(target.logits(hidden), law)[0]
            draft_q = probabilities(drafted.logits, law)[0]
            yield answer, (target_p, draft_q, drafted.tokens[0], drafted.coins[0])
        generation.commit(drafted, accepted, own, (hidden, features))


def weights(target_p, draft_q, tokens):
    """What the block rule compares with its coins: w_1..w_K and h_1..h_K."""
    w, h = [1.0], []
    for p, q, x in zip(target_p, draft_q, tokens):
        w.append(min(1.0, w[-1] * float(p[x] / q[x])))
    for i in range(1, K):
        m = (w[i] * target_p[i] - draft_q[i]).clamp(min=0).sum().item()
        h.append(m / (m + (1 - w[i])) if m else 0.0)
    return w[1:], [*h, w[K]]


def tell(say, rule, case):
    target_p, draft_q, tokens, coins = case
    keep = keep_block if rule == "block" else keep_tokens
    (n, w), (_, own) = keep(*case), accept_one(*case, rule)
    kept = " ".join(say(x) for x in tokens[:n].tolist()) or "nothing"
    print(f"  It keeps {n} of {K}: {kept}")
    if n == K:
        return print(f"  and adds {say(own)}, drawn from target_p at the place after: a bonus\n")
    mass = (w * target_p[n] - draft_q[n]).clamp(min=0)
    top = (mass / mass.sum()).topk(3)
    pairs = zip(top.indices.tolist(), top.values.tolist())
    shares = ", ".join(f"{say(x)} {share:.2f}" for x, share in pairs)
    scaled = f"{w:.3f} target_p" if w < 1 else "target_p"
    print(f"  and adds {say(own)}, drawn from the residual max(0, {scaled} - draft_q):\n"
          f"  {shares}, ..\n")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(prog="verify.py", description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="def read_config(path):\n")
    parser.add_argument("--seed", type=int, default=0)
    ours = parser.parse_args()
    args = options.arguments(["--prompt", ours.prompt, "--seed", str(ours.seed)])
    target, tokenizer = find_target(args.target, args.dtype)
    target = ready_to_serve(target, args.device, args.dtype)
    draft, _ = find_draft("static", target, 0)

    def say(token):
        put, end = tokenizer.stream()
        return repr(put(token) + end())

    for answer, case in rounds(target.eval(), draft, tokenizer, args):
        if accept_one(*case, "block")[0] > accept_one(*case, "token")[0]:
            break
    put, end = tokenizer.stream()
    text = ours.prompt + "".join(map(put, answer)) + end()
    print("The text so far:", repr(text[-60:]))
    print(f"The draft guesses {K} tokens; the target judges all of them in one pass.\n")
    target_p, draft_q, tokens, coins = case
    w, h = weights(target_p, draft_q, tokens)
    print("  i  token     draft_q  target_p   ratio     coin   token rule         block rule")
    for i, x in enumerate(tokens.tolist()):
        q, p, coin = draft_q[i, x].item(), target_p[i, x].item(), coins[i].item()
        by_token = f"{'<' if coin * q < p else '>='} min(1, ratio)"
        by_block = f"{'<' if coin < h[i] else '>='} h = {h[i]:.3f}   w = {w[i]:.3f}"
        print(f"  {i + 1}  {say(x):8s} {q:8.3f}  {p:8.3f} {p / q:7.2f}  {coin:7.3f}   "
              f"{by_token:17s}  {by_block}")
    print("\nThe token rule goes from left to right, and stops at the first coin that is no less.")
    tell(say, "token", case)
    print("The block rule takes the last coin that is less than its h, whatever stood before it.")
    tell(say, "block", case)
    print("Both give the target's distribution: the first lines of verify.py say why.")


