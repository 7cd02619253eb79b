"""Serving: a batch of requests, from prompt to trace, in rounds of draft, verify, commit.

Speculative decoding (Leviathan et al. 2211.17192) with chains.  A Generation holds everything that belongs to its
requests: their tokens, their random numbers, both models' caches.  Nothing is ever undone: caches are indexed by
position, so the next round writes over what was rejected.

Letters: B batch rows, T tokens, F features to read, K drafted tokens a round, R rounds, V vocabulary, D hidden width.
"""

import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from types import FunctionType, MethodType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from draft import Draft, FixedLength
from model import SPARE, Transformer, UserError
from rl import Trace
from verify import Sampling, accept

LONGEST = 8  # drafted tokens a round, where the number is found as it goes


@dataclass
class Request:
    prompt: list  # token ids, the begin token included
    max_new_tokens: int
    seed: int
    temperature: float
    kind: str = "prompts"  # class of traffic
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all


class Generation:
    """Speculative decoding of B requests.  Without a draft it is plain decoding: the same loop, a bonus token a round.

    K: drafted tokens a round; `round` may be told a lower number.
    Row b has committed `committed[b]`.  The target has read all of it but the last token; `unread[b]` are the
    features of what it has read since the draft looked last."""

    @torch.no_grad()
    def __init__(self, target, draft, requests, K):
        self.target, self.draft, self.requests, self.K = target, draft, requests, K
        self.device = device = target.lm_head.weight.device
        self.generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        self.sampling = Sampling([(r.temperature, r.top_p, r.top_k) for r in requests], device)
        self.stopped = [False] * len(requests)
        self.committed = [list(r.prompt) for r in requests]
        self.rounds = [[] for _ in requests]
        slots = max(len(r.prompt) + r.max_new_tokens for r in requests) + 2 * K + 1
        self.target_cache = target.new_cache(len(requests), slots)
        self.draft_cache = draft.new_cache(len(requests), slots) if draft else None

        ids = pad_sequence([torch.tensor(r.prompt[:-1]) for r in requests], batch_first=True).to(device)
        positions = torch.arange(ids.shape[1], device=device).expand(len(requests), -1)
        _, features = target(ids, positions, self.target_cache)
        self.prompt_features = [features[b, : len(r.prompt) - 1] for b, r in enumerate(requests)]
        self.unread = [[f] for f in self.prompt_features]

    def active(self, b):
        return not self.stopped[b] and len(self.committed[b]) < len(self.requests[b].prompt) + self.requests[b].max_new_tokens

    @property
    def done(self):
        return not any(self.active(b) for b in range(len(self.requests)))

    @torch.no_grad()
    def round(self, K=None):
        """Draft, verify, commit.  Returns per row (accepted tokens, the target's own token); None if complete."""
        K = self.K if K is None else K
        length = torch.tensor([len(ids) for ids in self.committed], device=self.device)
        uniforms = torch.stack([torch.rand(2 * K + 1, generator=g, dtype=torch.float64) for g in self.generators])
        uniforms = uniforms.to(self.device)

        # Draft.
        draft_tokens, draft_logits = torch.empty(len(self.requests), 0, dtype=torch.int64, device=self.device), None
        if K:
            draft_tokens, draft_logits = self.draft.propose(*self.fresh(), uniforms[:, :K], self.sampling, self.draft_cache)

        # Verify: the last committed token and the drafted ones, at positions length-1 .. length-1+K.
        last_token = torch.tensor([ids[-1:] for ids in self.committed], device=self.device)
        positions = (length - 1)[:, None] + torch.arange(K + 1, device=self.device)
        block = torch.cat([last_token, draft_tokens.clamp(min=0)], dim=1)  # (B, K+1)
        hidden, features = self.target(block, positions, self.target_cache)
        target_logits = self.sampling.filter(self.target.logits(hidden))  # (B, K+1, V)
        num_accepted, next_token = accept(target_logits, draft_logits, draft_tokens, uniforms[:, K:], self.sampling.temperature)
        behaviour = self.sampling.logprobs(draft_logits, draft_tokens)  # (B, K)

        # Commit: nothing is undone, the next round goes on from `length` and writes over what was rejected.
        output = []
        drafted, decided = draft_tokens.tolist(), torch.stack([num_accepted, next_token], 1).tolist()
        for b, (n, own) in enumerate(decided):
            if not self.active(b):  # a finished row stands still
                output.append(None)
                continue
            kept = drafted[b][:n] + [own]
            n = next((i for i, token in enumerate(kept) if token in self.target.config.eos_token_ids), n)
            self.stopped[b] = kept[n] in self.target.config.eos_token_ids  # the answer ends with its first stop token, whose ever
            if K:
                self.unread[b].clear()
            self.unread[b].append(features[b, : n + 1])
            self.rounds[b].append((length[b] - 2, draft_tokens[b], behaviour[b], hidden[b], features[b, : n + 1], n))
            self.committed[b] += kept[: n + 1]
            output.append((kept[:n], kept[n]))
        return output

    def fresh(self):
        """What the draft has yet to read, rows padded at their ends: features (B, F, 3D), the token that follows each
        (B, F), their positions, and the index of each row's last one (B,)."""
        features = [torch.cat(u) if len(u) > 1 else u[0] for u in self.unread]
        ids = [torch.tensor(ids[-len(f) :]) for ids, f in zip(self.committed, features)]
        last = torch.tensor([len(f) - 1 for f in features])
        first = torch.tensor([len(ids) for ids in self.committed]) - 2 - last
        positions = first[:, None] + torch.arange(int(last.max()) + 1)
        return (pad_sequence(features, batch_first=True), *(x.to(self.device) for x in (pad_sequence(ids, batch_first=True), positions, last)))

    def trace(self, b, version=0):
        """Rounds that drafted less than the longest one are padded: tokens with -1, the rest with 0."""
        request = self.requests[b]
        starts, draft_tokens, behaviour, hidden, features, accepted = zip(*self.rounds[b])
        return Trace(
            ids=torch.tensor(self.committed[b], device=self.device), prompt_length=len(request.prompt),
            features=torch.cat([self.prompt_features[b], *features]), starts=torch.stack(starts),
            draft_tokens=pad_sequence(draft_tokens, batch_first=True, padding_value=-1),
            behaviour_logprobs=pad_sequence(behaviour, batch_first=True),
            target_hidden=pad_sequence(hidden, batch_first=True), head=self.target.logits, num_accepted=torch.tensor(accepted),
            temperature=request.temperature, version=version, top_p=request.top_p, top_k=request.top_k)


def rounds(generation, draft_length):
    """Round after round until every request is complete, each as long as `draft_length` says."""
    while not generation.done:
        begun, K = time.perf_counter(), draft_length.choose()
        output = generation.round(K)
        draft_length.observe(K, [len(kept) for kept, _ in filter(None, output)], time.perf_counter() - begun)
        yield output


def generate(target, draft, request, K, version=0):
    """Answers one request -> (its trace, seconds).  K: a number, or the DraftLength that chooses one every round."""
    begun = time.perf_counter()
    draft_length = FixedLength(K) if isinstance(K, int) else K
    generation = Generation(target, draft, [request], draft_length.longest)
    for _ in rounds(generation, draft_length):
        pass
    seconds = time.perf_counter() - begun
    return generation.trace(0, version), seconds


def seconds_per_round(target, draft, temperature):
    """Of rounds with 0, 1, .. LONGEST drafted tokens.  A sweep through all of them meets the machine in one mood, so a
    round's share of its sweep counts: the median of nine sweeps, of fewer (two at least) if they take over three seconds."""
    context = min(target.config.max_position_embeddings, draft.config.max_position_embeddings)
    prompt = [0] * max(2, min(128, context - 64))  # a sweep drafts and commits less than 64 tokens
    sweeps, started = [], time.perf_counter()
    for _ in tqdm(range(10), desc="timing rounds", leave=False, disable=None, delay=2):
        if len(sweeps) > 2 and time.perf_counter() - started > 3:
            break
        generation = Generation(target, draft, [Request(prompt, 64, 0, temperature)], LONGEST)
        generation.round(LONGEST)  # the draft reads the prompt
        sweeps.append([])
        for K in range(LONGEST, -1, -1):
            begun = time.perf_counter()
            generation.round(K)
            sweeps[-1].insert(0, time.perf_counter() - begun)
    sweeps = torch.tensor(sweeps[1:], dtype=torch.float64)  # the first one warms up
    share = (sweeps / sweeps.sum(1, keepdim=True)).median(0).values
    return (share * sweeps.sum(1).median() / share.sum()).tolist()


# ---- the fast path, chosen once: forwards of fixed shapes, compiled ------------------------------------

ROWS = (1, 5, 9)  # tokens of a compiled forward: plain decoding's, those of up to 4 and of up to 8 drafted tokens
# Inductor's own products take a quarter of oneDNN's time in bfloat16; in float32 MKL's are faster from a few rows on.
PACKED = {"freezing": True, "cpp.enable_concat_linear": True}
OWN_PRODUCTS = {"max_autotune": True, "max_autotune_gemm_backends": "CPP", "autotune_num_choices_displayed": 0}


def slots_for(tokens):
    """Cache slots of compiled forwards that serve so many tokens: few different numbers, so that torch's cache knows them."""
    return -(-(tokens + SPARE) // 256) * 256


@torch.no_grad()
def compile_forwards(target, drafts, slots, learning=None):
    """Gives the models forwards that torch.compile made, for one request at a time whose caches have `slots` slots; what else
    they are asked for (a prompt, a batch, the learner's replay) goes the old way.  Returns None, or in one line why
    torch cannot compile here; then nothing is changed.

    What never changes has its weights packed into its graphs.  Those of the draft that serves while it is `learning` are
    arguments of its graphs, so what is published by copying into them serves at once.  Do not copy a model afterwards."""
    forwards = [(target, "forward", ROWS, None)]  # the last one: the width of what comes with a token besides its id
    for draft in drafts:
        if isinstance(draft, Draft):
            forwards += [(draft, "read", ROWS, draft.fc.in_features), (draft, "extend", ROWS[:1], draft.config.hidden_size)]
        elif isinstance(draft, Transformer):
            forwards.append((draft, "forward", ROWS, None))
    for model, name, _, _ in forwards:
        setattr(model, name, fixed_shapes(getattr(type(model), name), model, slots))
        model.new_cache = lambda batch, length, model=model: type(model).new_cache(
            model, batch, slots if batch == 1 and length + SPARE <= slots else length)
    try:
        for model, name, rows, width in tqdm([(m, n, r, w) for m, n, all_rows, w in forwards for r in all_rows], desc="compiling",
                                             leave=False, disable=None):
            origin = target if name == "read" else model
            tokens = [torch.zeros(1, rows, width, dtype=origin.lm_head.weight.dtype)] if width else []
            last = {"last": torch.tensor([rows - 1])} if name == "read" else {}
            packed = PACKED | (OWN_PRODUCTS if rows == 1 or model.lm_head.weight.dtype == torch.bfloat16 else {})
            with torch._inductor.config.patch({} if model is learning else packed):
                getattr(model, name)(*tokens, torch.zeros(1, rows, dtype=torch.int64), torch.arange(rows)[None], model.new_cache(1, 1), **last)
    except Exception as error:  # no compiler, or one that fails: torch has many kinds
        for model, name, _, _ in forwards:
            vars(model).pop(name)
            vars(model).pop("new_cache", None)
        return next(iter(str(error).splitlines()), type(error).__name__)


def fixed_shapes(function, model, slots):
    """A method of a model, (tokens (1, T, ..) .., positions (1, T), cache, ..) -> tensors (1, T or 1, ..), with its tokens
    padded to one of ROWS.  Pads stand behind the others, where a cache holds nothing: what they leave is written over."""
    # torch keeps graphs with the code, which all models of a class share: a copy of the code keeps them apart.
    own_code = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    graph = torch.compile(MethodType(own_code, model), fullgraph=True, dynamic=False,
                          options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})

    def forward(*args, **more):
        *tokens, positions, cache = args if len(args) > 2 else (None, None, None)
        T = positions.shape[1] if cache and cache.k[0].shape[:2] == (1, slots) else slots
        rows = next((rows for rows in ROWS if T <= rows), None)
        if rows is None or torch.is_grad_enabled():
            return function(model, *args, **more)
        if rows > T:
            tokens = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, rows - T)) for x in tokens]
            positions = positions[:, :1] + torch.arange(rows)
        return [x[:, :T] for x in graph(*tokens, positions, cache, **more)]

    return forward


# ---- python aurora.py --profile: where the time goes ------------------------------------------------------

PARTS = ("target", "draft", "acceptance", "bookkeeping")
PROFILED = (0, 1, 2, 4, LONGEST)
LEFT = 96  # tokens that a profiled request adds to its context


def profile(target, draft, context):
    """{K: medians of the seconds that rounds of K drafted tokens spend in each of PARTS} for K in PROFILED, after `context`
    tokens.  Rounds take turns, so that all meet the machine in one mood."""
    spent, laps = Counter(), {K: [] for K in PROFILED}

    def timed(part, function):
        def run(*args, **more):
            begun = time.perf_counter()
            out = function(*args, **more)
            spent[part] += time.perf_counter() - begun
            return out

        return run

    with ExitStack() as wrappers:
        for part, owner, name in (("target", target, "forward"), ("target", target, "logits"), ("draft", draft, "propose"),
                                  ("acceptance", sys.modules[__name__], "accept")):
            wrappers.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        for seed in range(4):
            generation = Generation(target, draft, [Request([0] * context, LEFT, seed, 0.8)], LONGEST)
            generation.round(LONGEST)  # the draft reads the prompt
            for K in cycle(PROFILED):
                spent.clear()
                begun = time.perf_counter()
                generation.round(K)
                laps[K].append(dict(spent, bookkeeping=time.perf_counter() - begun - sum(spent.values())))
                if generation.done:  # a finished one would stand still
                    break
    return {K: [statistics.median([lap.get(part, 0.0) for lap in rounds] or [0.0]) for part in PARTS] for K, rounds in laps.items()}


def read_bandwidth(size):
    """Bytes per second at which so many bytes are read and added up: the best of nine times."""
    buffer, best = torch.ones(size // 4), float("inf")
    for _ in range(9):
        begun = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - begun)
    return size / best


def print_profile(target, draft, context, compiled, learning=None):
    """Where a round goes, how far the target is from the physical floor, and how a round grows with its context, up to `context`."""
    weight = target.lm_head.weight
    table = 0 if target.config.tie_word_embeddings else target.model.embed_tokens.weight.numel()  # a row of it is read
    size = (sum(p.numel() for p in target.parameters()) - table) * weight.element_size()
    room = context - LEFT - 2 * LONGEST - 1
    if room < 2:
        raise UserError(f"--profile needs a context of {context - room + 2} tokens, these models have {context}")
    first = None
    for context in sorted({min(c, room) for c in (128, 512, 2048)}):
        tokens = context + LEFT + 2 * LONGEST + 1
        trouble = compile_forwards(target, [draft], slots_for(tokens), learning) if compiled else None
        if trouble:
            print(f"not compiled: {trouble}")
        caches = [m.new_cache(1, tokens) for m in (target, draft)]
        held = [sum(x.nbytes for x in c.k + c.v) / 1e6 if hasattr(c, "k") else 0.0 for c in caches]
        print(f"\ncontext {context}: caches of {held[0]:.1f} MB for the target and {held[1]:.1f} MB for the draft; medians of a round in microseconds")
        print("K   " + "".join(f"{part:>18s}" for part in PARTS) + "     round  in plain rounds  in target forwards")
        laps = profile(target, draft, context)
        plain = sum(laps[0]), laps[0][0]  # a round with K = 0, and the target's part of it
        first = first or plain[0]
        for K, parts in laps.items():
            whole = sum(parts)
            print(f"{K:<4d}" + "".join(f"{1e6 * x:12.0f} {x / whole:4.0%}" for x in parts)
                  + f" {1e6 * whole:10.0f} {whole / plain[0]:16.2f} {whole / plain[1]:19.2f}", flush=True)
        bandwidth = read_bandwidth(size)
        print(f"plain decoding: {plain[0] / first:.2f} of its time at the shortest context; the target reads {size / 1e6:.0f} MB of weights a forward "
              f"at {size / plain[1] / 1e9:.1f} GB/s, {plain[1] * bandwidth / size:.2f} times what reading them alone takes ({bandwidth / 1e9:.1f} GB/s)")
