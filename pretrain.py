"""How the shipped weights were made.

    python pretrain.py --corpus                       what the corpus is made of on this machine
    python pretrain.py --target                       train weights/target.pt
    python pretrain.py --answers answers.pt           what the target goes on to write after training text
    python pretrain.py --draft python,cpp,docs --with answers.pt           train weights/draft.pt, the static draft
    python pretrain.py --draft python --with answers.pt --out weights/draft-python.pt
    python pretrain.py --eval                         held-out bits per byte and overlap of what is shipped

Training resumes from its checkpoint file.  With glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 saves
time: large blocks are then kept instead of being mapped anew at every step.

The text is what every machine with Python and torch has: the standard library's source (`python`), the
C++ headers under torch's include folder (`cpp`), and prose (`docs`): pydoc's topics and the long
docstrings of the standard library, numpy and torch.  crc32(name) % 10 decides where a file goes:
0 is the traffic that aurora.py serves, 1 the evaluation set, the rest is trained on.  A docstring goes
where its file goes, and one that is in `docs` is cut out of `python`.
"""

import argparse
import ast
import copy
import inspect
import math
import platform
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as transformer
import rl
from draft import Draft, load_draft
from model import Config, Transformer, load_target, save
from verify import inverse_cdf, probabilities

BOS = 256
WEIGHTS = Path(__file__).parent / "weights"
CLASSES = ("python", "cpp", "docs")
TEMPERATURE = 0.8  # at which drafts are trained and measured, aurora.py's default
PROMPT, ANSWER = 64, 192  # bytes of text, and what the target writes after them: what drafts learn from
HELD_OUT = 96  # answers a class that drafts are measured on
LONG_DOCSTRING = 300  # characters; shorter ones stay in the source
TARGET = Config(
    vocab_size=257, hidden_size=384, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=96, max_position_embeddings=2048, bos_token_id=BOS, suppress_tokens=(BOS,),
)


# ---- the corpus --------------------------------------------------------------------------------


def split_of(name):
    return {0: "traffic", 1: "eval"}.get(zlib.crc32(name.encode()) % 10, "train")


def is_add_doc(name):
    return "add" in name and "doc" in name


def prose_in(tree):
    """Nodes of long docstrings, and of the strings that numpy and torch attach with add_newdoc, add_docstr."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body
            strings = [body[0].value] if body and isinstance(body[0], ast.Expr) else []
        elif isinstance(node, ast.Call) and is_add_doc(getattr(node.func, "id", getattr(node.func, "attr", ""))):
            strings = [n for a in node.args for n in ast.walk(a)]
        else:
            continue
        for n in strings:
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) >= LONG_DOCSTRING:
                yield n


def documents(splits, classes=CLASSES):
    """Yields (class, name, text) for every document of these splits and classes, before repeats are removed."""
    from pydoc_data import topics

    for topic, text in sorted(topics.topics.items()):
        if "docs" in classes and split_of(f"pydoc/{topic}") in splits:
            yield "docs", f"pydoc/{topic}", text.strip() + "\n"
    roots = {"python": Path(sysconfig.get_paths()["stdlib"]),
             "numpy": Path(np.__file__).parent, "torch": Path(torch.__file__).parent}
    for package, root in roots.items():
        if "docs" not in classes and package not in classes:
            continue
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if "site-packages" in parts or parts[0] in ("pydoc_data", "include") or any("test" in p for p in parts):
                continue
            name = "/".join((package, *parts))
            if split_of(name) not in splits:
                continue
            try:
                source = path.read_text()
                nodes = list(prose_in(ast.parse(source)))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            if nodes and "docs" in classes:
                yield "docs", name, "\n".join(inspect.cleandoc(n.value).strip() + "\n" for n in nodes)
            if package == "python" and "python" in classes:
                lines = source.split("\n")  # as ast counts them: splitlines would split at form feeds too
                for n in nodes:
                    lines[n.lineno - 1 : n.end_lineno] = [None] * (n.end_lineno - n.lineno + 1)
                yield "python", name, "\n".join(line for line in lines if line is not None) + "\n"
    include = Path(torch.__file__).parent / "include"
    for path in sorted(include.rglob("*")) if "cpp" in classes else ():
        name = "include/" + path.relative_to(include).as_posix()
        if path.suffix in (".h", ".hpp", ".cuh") and "test" not in name and split_of(name) in splits:
            yield "cpp", name, path.read_text(errors="ignore")


def texts_of(kind, split):
    """What aurora.py cuts its prompts from: "traffic" are files that no training and no evaluation has read."""
    return [text for _, _, text in documents((split,), (kind,))]


def without_repeats(text, seen, window=3):
    """Drops every run of `window` or more lines that `seen` holds already (blank lines do not count), and
    every line of 60 characters or more that it holds; then adds this text's own runs and lines."""
    lines = text.split("\n")
    full = [(i, line.strip()) for i, line in enumerate(lines) if line.strip()]
    drop, new = set(), set()
    for j in range(len(full)):
        run = full[j : j + window]
        key = hash("\n".join(line for _, line in run)) if len(run) == window else None
        long = hash(full[j][1]) if len(full[j][1]) >= 60 else None
        if key in seen:
            drop.update(range(run[0][0], run[-1][0] + 1))
        if long in seen:
            drop.add(full[j][0])
        new |= {key, long} - {None}
    seen |= new
    return "\n".join(line for i, line in enumerate(lines) if i not in drop).strip("\n") + "\n"


def corpus():
    """{class: {split: [(name, text)]}}.  The evaluation set is read first, then the traffic: what repeats
    is removed from the later one, so held-out text is whole and training text has none of it."""
    out = {c: {"eval": [], "traffic": [], "train": []} for c in CLASSES}
    seen = set()
    for split in ("eval", "traffic", "train"):
        for kind, name, text in documents((split,)):
            text = without_repeats(text, seen)
            if len(text) >= 200:
                out[kind][split].append((name, text))
    return out


def as_bytes(documents):
    return np.frombuffer("\n".join(text for _, text in documents).encode(errors="ignore"), dtype=np.uint8)


def print_corpus(texts):
    for kind in CLASSES:
        sizes = {s: sum(len(t) for _, t in texts[kind][s]) for s in texts[kind]}
        counts = {s: len(texts[kind][s]) for s in texts[kind]}
        train = {line.strip() for _, t in texts[kind]["train"] for line in t.split("\n")}
        held = [line.strip() for _, t in texts[kind]["eval"] for line in t.split("\n") if len(line.strip()) >= 40]
        print(f"{kind:7s}", *(f"{s} {counts[s]:5d} files {sizes[s] / 1e6:6.2f} MB |" for s in sizes),
              f"held-out lines of 40+ characters also in train: {sum(x in train for x in held) / len(held):.1%}")


# ---- the target --------------------------------------------------------------------------------


def sample(streams, batch, length, rng):
    """(batch, length + 1) int64: the begin token, then `length` bytes from a random place of each class in turn."""
    out = np.full((batch, length + 1), BOS, dtype=np.int64)
    for row in range(batch):
        stream = streams[row % len(streams)]
        start = rng.integers(len(stream) - length)
        out[row, 1:] = stream[start : start + length]
    return torch.from_numpy(out)


def windows(stream, count, length):
    """(count, length + 1) int64: `count` evenly spaced stretches of held-out text, each after the begin token."""
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return torch.from_numpy(np.stack([np.concatenate([[BOS], stream[s : s + length]]) for s in starts]).astype(np.int64))


def next_byte_loss(model, ids):
    """Mean negative log-likelihood, nats per byte."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = model(ids[:, :-1])
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model, stream, count=24, length=2048):
    """Held-out bits per byte, every window from an empty context."""
    losses = [next_byte_loss(model, row[None]).item() for row in windows(stream, count, length)]
    return sum(losses) / len(losses) / math.log(2)


class CausalAttention(torch.autograd.Function):
    """Causal attention with its score matrix written out.  On a CPU torch's fused kernel goes backward in float32;
    bfloat16 matrix products are faster up to some 500 positions, where the processor has AMX."""

    @staticmethod
    def forward(ctx, q, k, v):  # q (B, H, T, E); k, v (B, G, T, E) -> (B, H, T, E)
        B, H, T, E = q.shape
        flat_q, k, v = q.reshape(-1, H // k.shape[1] * T, E), k.reshape(-1, T, E), v.reshape(-1, T, E)
        scores = torch.bmm(flat_q, k.transpose(1, 2)).view(-1, T, T).float() * E**-0.5
        keep = torch.arange(T)[:, None] >= torch.arange(T)
        p = scores.masked_fill(~keep, float("-inf")).softmax(-1).to(q.dtype).view(-1, flat_q.shape[1], T)
        ctx.save_for_backward(flat_q, k, v, p)
        return torch.bmm(p, v).view(B, H, T, E)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        B, H, T, E = grad.shape
        grad = grad.reshape(q.shape)
        dp = torch.bmm(grad, v.transpose(1, 2)).float()
        ds = (p * (dp - (dp * p).sum(-1, keepdim=True)) * E**-0.5).to(p.dtype)
        dk, dv = (torch.bmm(x.transpose(1, 2), y).view(B, -1, T, E) for x, y in ((ds, q), (p, grad)))
        return torch.bmm(ds, k).view(B, H, T, E), dk, dv


def attend_densely(q, k, v, **_):
    return CausalAttention.apply(q.bfloat16(), k.bfloat16(), v.bfloat16())


def train(model, minutes, checkpoint, batch_loss, evaluate):
    """Runs `minutes` of steps, resuming from `checkpoint`; batch_loss(step, progress) -> (loss, bytes); every tenth
    of the way evaluate() is printed and kept.  Short warm-up, constant rate, linear decay over the last third."""
    opts = rl.optimizers(model, lr=0.02, weight_decay=0.01)
    base_lr = [o.param_groups[0]["lr"] for o in opts]
    step, spent, history, budget = 0, 0.0, [], minutes * 60
    if Path(checkpoint).exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["optimizers"]):
            o.load_state_dict(s)
        step, spent, history = state["step"], state["seconds"], state["history"]
    bar = tqdm(total=int(budget), initial=int(spent), unit="s", mininterval=10)
    mean, saved = None, time.time()
    while spent < budget:
        begun, progress = time.time(), spent / budget
        for o, lr in zip(opts, base_lr):
            o.param_groups[0]["lr"] = lr * min(1.0, progress / 0.01 + 0.01) * min(1.0, (1.0 - progress) / 0.33 + 0.01)
        loss, size = batch_loss(step, progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad()
        step, took = step + 1, time.time() - begun
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        spent += min(took, 20)  # a compilation is not training time
        bar.update(int(spent) - bar.n)
        bar.set_postfix_str(f"step {step} loss {mean:.3f} {size / took:.0f} bytes/s")
        if spent * 10 // budget > len(history) or spent >= budget:
            history.append(evaluate())
            tqdm.write(f"{spent / 60:.0f} min, step {step}: {history[-1]}")
        if time.time() - saved > 300 or spent >= budget:
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                        "step": step, "seconds": spent, "history": history}, f"{checkpoint}.new")
            Path(f"{checkpoint}.new").rename(checkpoint)
            saved = time.time()
    bar.close()
    return history


def record(texts, **more):
    """What the weights were made of; stands in every checkpoint."""
    sizes = {f"{c} {s}": sum(len(t) for _, t in d) for c in texts for s, d in texts[c].items()}
    return {"corpus": "Python standard library (PSF licence); C++ headers under torch/include (BSD-3-Clause; parts "
                      "Apache-2.0, MIT, BSL-1.0); docstrings of the standard library, numpy and torch (PSF, BSD-3-Clause)",
            "characters": sizes, "python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "split": "crc32(name) % 10: 0 traffic, 1 evaluation, the rest training"} | more


def train_target(args, texts):
    """Sequences of 256, then 512, 1024 and 2048 bytes."""
    torch.manual_seed(0)
    streams = [as_bytes(texts[c]["train"]) for c in CLASSES]
    model = Transformer(TARGET)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    loss_fn = torch.compile(next_byte_loss, dynamic=False)

    def batch_loss(step, progress):
        length = 256 if progress < 0.55 else 512 if progress < 0.75 else 1024 if progress < 0.95 else 2048
        transformer.attend = attend_densely if length <= 512 else F.scaled_dot_product_attention
        ids = sample(streams, 12288 // length, length, np.random.default_rng(step))
        return loss_fn(model, ids), ids.numel()

    def evaluate():
        transformer.attend = F.scaled_dot_product_attention
        return {c: round(bits_per_byte(model, as_bytes(texts[c]["eval"]), count=6), 3) for c in CLASSES}

    history = train(model, args.minutes, args.checkpoint, batch_loss, evaluate)
    weights = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}
    save(args.out, TARGET, weights, record(texts, bits_per_byte=history, minutes=args.minutes))


# ---- the static drafts ---------------------------------------------------------------------------


@torch.no_grad()
def written(target, stream, count, seed):
    """(count, 1 + PROMPT + ANSWER) int64: the begin token, a stretch of text, and what the target, in bfloat16, answers at TEMPERATURE."""
    rng, generator, target = np.random.default_rng(seed), torch.Generator().manual_seed(seed), copy.deepcopy(target).bfloat16()
    out, batch = [], min(count, 128)
    bar = tqdm(total=count * ANSWER, unit="byte", leave=False)
    while len(out) * batch < count:
        ids = sample([stream], batch, PROMPT, rng)
        positions, cache = torch.arange(PROMPT + ANSWER).expand(batch, -1), target.new_cache(batch, PROMPT + ANSWER)
        target(ids[:, :PROMPT], positions[:, :PROMPT], cache)
        for t in range(PROMPT, PROMPT + ANSWER):
            hidden, _ = target(ids[:, t:], positions[:, t : t + 1], cache)
            p = probabilities(target.logits(hidden[:, 0]), torch.full((batch,), TEMPERATURE, dtype=torch.float64))
            next_byte = inverse_cdf(p, torch.rand(batch, generator=generator, dtype=torch.float64))
            ids = torch.cat([ids, next_byte[:, None]], dim=1)
            bar.update(batch)
        out.append(ids)
    bar.close()
    return torch.cat(out)[:count]


def write_answers(args, texts):
    target = load_target(args.target_path)[0].eval()
    torch.save({c: written(target, as_bytes(texts[c]["train"]), args.count, seed=0).short() for c in CLASSES}, args.answers)


def chains(target, draft, ids, starts, K):
    """The draft as if rounds had started at `starts` (B, R) and the text's own next tokens had been drafted.

    ids (B, T+1).  Returns draft logits (B*R, K, V), target logits (B*R, K, V) and tokens (B*R, K)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            hidden, features = target(ids[:, :-1])
        place = starts[..., None] + 2 + torch.arange(K)  # (B, R, K): the tokens that are guessed
        row = torch.arange(len(ids))[:, None, None]
        tokens = ids[row, place]
        draft_logits = draft.replay(features, ids[:, 1:], starts, tokens[..., :-1])
    with torch.no_grad():
        target_logits = target.logits(hidden.float())
    return draft_logits.flatten(0, 1).float(), target_logits[row, place - 1].flatten(0, 1).float(), tokens.flatten(0, 1)


def draft_loss(target, draft, ids, starts, K, objective):
    draft_logits, target_logits, tokens = chains(target, draft, ids, starts, K)
    if objective == "kl":
        return rl.forward_kl_loss(draft_logits, target_logits, TEMPERATURE) / K
    return rl.target_side_loss(draft_logits, target_logits, tokens, TEMPERATURE, objective)


@torch.no_grad()
def held_out_overlap(target, draft, ids, K):
    """Overlap at each place of the chain, given that it is reached (K,), and the acceptance length it makes.

    ids: what the target wrote after held-out text.  Its tokens are draws from target_p, so E_{x~p}[sum_j S_{<j} alpha_j]
    is what serving would accept if every position of the answer were the start of a round."""
    starts = torch.arange(PROMPT - 1, ids.shape[1] - 2 - K, 2).expand(len(ids), -1)
    draft_logits, target_logits, tokens = chains(target, draft, ids, starts, K)
    alpha = rl.acceptance(draft_logits, target_logits, tokens, TEMPERATURE)
    return [round(x, 4) for x in alpha.tolist()], round(1 + alpha.cumprod(0).sum().item(), 4)


def train_draft(args, texts, classes):
    """Distilled offline from the target's distributions, at the temperature that serves, on text of `classes` and,
    where --with gives it, on what the target itself wrote after such text, which is what serving will read."""
    torch.manual_seed(0)
    target = load_target(args.target_path)[0].eval()
    streams = [as_bytes(texts[c]["train"]) for c in classes]
    answers = torch.load(args.answered, weights_only=True) if args.answered else {}
    answers = [answers[c].long() for c in classes if answers]
    held = {c: written(target, as_bytes(texts[c]["eval"]), HELD_OUT, seed=1) for c in CLASSES}
    draft, before = load_draft(args.init, target) if args.init else (Draft(target), {})
    K = args.chain
    loss_fn = torch.compile(draft_loss, dynamic=False)

    def batch_loss(step, progress):
        rng = np.random.default_rng(step)
        rows, length, R = (2, 1024, 256) if step % 4 == 3 else (6, 256, 128)  # mostly short, now and then far back
        ids = sample(streams, rows, length, rng)
        for row in range(rows if length == PROMPT + ANSWER and answers and step % 4 else 0):
            kind = answers[row % len(answers)]
            ids[row] = kind[rng.integers(len(kind))]
        starts = torch.from_numpy(np.sort(np.stack([rng.permutation(length - 1 - K)[:R] for _ in ids])))
        return loss_fn(target, draft, ids, starts, K, args.objective), ids.numel()

    def evaluate():
        return {c: held_out_overlap(target, draft, held[c], K) for c in CLASSES}

    history = train(draft, args.minutes, args.checkpoint, batch_loss, evaluate)
    save(args.out, draft.config, {n: t.to(torch.bfloat16) for n, t in draft.state_dict().items()},
         record(texts, classes=list(classes), objective=args.objective, minutes=args.minutes + before.get("minutes", 0), overlap=history))


def evaluate_shipped(texts):
    """Held-out bits per byte of the target; overlap of both drafts per class and place, and how it moved at last."""
    target = load_target(WEIGHTS / "target.pt")[0].eval()
    bits = {c: bits_per_byte(target, as_bytes(texts[c]["eval"])) for c in CLASSES}
    print("target    bits per byte ", *(f"{c} {b:.3f} " for c, b in bits.items()), f"mean {sum(bits.values()) / 3:.3f}")
    held = {c: written(target, as_bytes(texts[c]["eval"]), HELD_OUT, seed=1) for c in CLASSES}
    for name in ("draft", "draft-python"):
        draft, kept = load_draft(WEIGHTS / f"{name}.pt", target)
        for c in CLASSES:
            places, length = held_out_overlap(target, draft, held[c], 5)
            history = kept["overlap"]
            then, last = history[int(0.75 * (len(history) - 1))][c][1], history[-1][c][1]
            print(f"{name:13s} {c:7s} overlap at 1..5: {' '.join(f'{a:.3f}' for a in places)}   acceptance length {length:.3f}"
                  f"   last quarter of training {then:.3f} -> {last:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", action="store_true")
    what.add_argument("--target", action="store_true")
    what.add_argument("--answers", metavar="FILE", help="write what the target answers to training text")
    what.add_argument("--draft", metavar="CLASSES", help="python,cpp,docs or some of them")
    what.add_argument("--eval", action="store_true")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--count", type=int, default=3072, help="answers a class")
    parser.add_argument("--with", dest="answered", metavar="FILE", help="train the draft on these answers too")
    parser.add_argument("--objective", choices=("log", "expected", "kl"), default="log", help="of the draft")
    parser.add_argument("--chain", type=int, default=5, help="tokens a round that the draft is trained for")
    parser.add_argument("--init", metavar="FILE", help="go on from this draft instead of random weights")
    parser.add_argument("--target-path", default=WEIGHTS / "target.pt")
    parser.add_argument("--checkpoint", help="where training resumes from; by default the file to write with .ckpt at its end")
    parser.add_argument("--out", help="the file to write")
    args = parser.parse_args()
    args.out = args.out or WEIGHTS / ("target.pt" if args.target else "draft.pt")
    args.checkpoint = args.checkpoint or f"{args.out}.ckpt"
    classes = args.draft.split(",") if args.draft else []
    if set(classes) - set(CLASSES):
        parser.error(f"--draft {args.draft}: expected some of {','.join(CLASSES)}")
    for path in filter(None, (args.answered, args.init)):
        if not Path(path).is_file():
            parser.error(f"there is no file {path}")
    for path in filter(None, (args.answers, args.out)):
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"cannot write {path}: its directory does not exist")
    texts = corpus()
    print_corpus(texts)
    if args.target:
        train_target(args, texts)
    if args.answers:
        write_answers(args, texts)
    if args.draft:
        train_draft(args, texts, classes)
    if args.target or args.draft:
        Path(args.checkpoint).unlink()  # it is done: the next run is another training, and would find this one at its end
    if args.eval:
        evaluate_shipped(texts)


if __name__ == "__main__":
    try:
        main()
    except transformer.UserError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        sys.exit(2)
