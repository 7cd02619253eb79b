"""Serving: a batch of requests, from prompt to trace, in rounds of draft, verify, commit.

Speculative decoding (Leviathan et al. 2211.17192) with chains.  A Generation holds everything that belongs to its
requests: their tokens, their random numbers, both models' caches.  Nothing is ever undone: caches are indexed by
position, so the next round writes over what was rejected.

Letters: B batch rows, T tokens, F features to read, K drafted tokens a round, R rounds, V vocabulary, D hidden width.
"""

import hashlib
import inspect
import statistics
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import cycle
from types import FunctionType, MethodType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from draft import Chain, FixedLength
from model import SPARE, Cache, UserError
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
    features of what it has read since the draft looked last.  Its tensors are inference tensors, which autograd refuses;
    `trace` copies them into ordinary ones."""

    @torch.inference_mode()
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

    @torch.inference_mode()
    def round(self, K=None, min_confidence=None):
        """Draft up to K tokens, fewer where the draft's confidence falls too low (Chain.propose); verify, commit.
        Returns per row (accepted tokens, the target's own token); None if complete."""
        K = self.K if K is None else K
        uniforms = torch.stack([torch.rand(2 * K + 1, generator=g, dtype=torch.float64) for g in self.generators])
        uniforms = uniforms.to(self.device)

        # Draft.
        draft_logits, nothing = None, torch.empty(len(self.requests), 0, device=self.device)
        draft_tokens, behaviour = nothing.long(), nothing
        if K:
            draft_tokens, draft_logits, behaviour = self.draft.propose(*self.fresh(), uniforms[:, :K], self.sampling, self.draft_cache, min_confidence)
        coins, K = uniforms[:, K:], draft_tokens.shape[1]  # the last one draws the target's own token, however far the chains went
        coins = torch.cat([coins[:, :K], coins[:, -1:]], dim=1)

        # Verify: the last committed token and the drafted ones, each where it stands.
        length = [len(ids) for ids in self.committed]
        last_token = torch.tensor([ids[-1:] for ids in self.committed], device=self.device)
        positions = torch.tensor([list(range(n - 1, n + K)) for n in length], device=self.device)
        block = torch.cat([last_token, draft_tokens.clamp(min=0)], dim=1)  # (B, K+1)
        hidden, features, target_logits = self.target.verify(block, positions, self.target_cache)
        target_logits = self.sampling.filter(target_logits)  # (B, K+1, V)
        num_accepted, next_token = accept(target_logits, draft_logits, draft_tokens, coins, self.sampling.temperature)

        # Commit: nothing is undone, the next round goes on from `length` and writes over what was rejected.
        output = []
        drafted, decided = draft_tokens.tolist(), torch.stack([num_accepted, next_token], 1).tolist()
        self.drafted = [sum(token >= 0 for token in row) for row in drafted]
        for b, (n, own) in enumerate(decided):
            if not self.active(b):  # a finished row stands still
                output.append(None)
                continue
            kept = drafted[b][:n] + [own]
            end = next((i for i, token in enumerate(kept) if token in self.target.config.eos_token_ids), None)
            if end is not None:  # the answer ends with its first stop token, whose ever
                self.drafted[b] = end if end < n else self.drafted[b]  # a drafted one stands as the target's own: it was not rejected
                self.stopped[b], n = True, end
            if K:
                self.unread[b].clear()
            self.unread[b].append(features[b, : n + 1])
            # The draft's step 0 stands at the last position that the target has read, beside the token that follows it.
            self.rounds[b].append((length[b] - 2, draft_tokens[b], behaviour[b], hidden[b], features[b, : n + 1], n))
            self.committed[b] += kept[: n + 1]
            output.append((kept[:n], kept[n]))
        return output

    def fresh(self):
        """What the draft has yet to read, rows padded at their ends: features (B, F, 3D), the token that follows each
        (B, F), their positions, and the index of each row's last one (B,)."""
        features = [torch.cat(u) if len(u) > 1 else u[0] for u in self.unread]
        lengths = [len(f) for f in features]
        longest, first = max(lengths), [len(ids) - 1 - n for ids, n in zip(self.committed, lengths)]
        ids = [ids[-n:] + [0] * (longest - n) for ids, n in zip(self.committed, lengths)]
        positions = [list(range(start, start + longest)) for start in first]
        last = [n - 1 for n in lengths]
        return (pad_sequence(features, batch_first=True), *(torch.tensor(x, device=self.device) for x in (ids, positions, last)))

    def trace(self, b, version=0):
        """Rounds that drafted less than the longest one are padded: tokens with -1, the rest with 0."""
        request = self.requests[b]
        starts, draft_tokens, behaviour, hidden, features, accepted = zip(*self.rounds[b])
        return Trace(
            ids=torch.tensor(self.committed[b], device=self.device), prompt_length=len(request.prompt),
            features=torch.cat([self.prompt_features[b], *features]), starts=torch.tensor(starts, device=self.device),
            draft_tokens=pad_sequence(draft_tokens, batch_first=True, padding_value=-1),
            behaviour_logprobs=pad_sequence(behaviour, batch_first=True),
            target_hidden=pad_sequence(hidden, batch_first=True), head=self.target.logits, num_accepted=torch.tensor(accepted),
            temperature=request.temperature, version=version, top_p=request.top_p, top_k=request.top_k)


def decode(generation, draft_length):
    """Round after round until every request is complete, each as long as `draft_length` says."""
    draft_length.begin()
    while not generation.done:
        begun = time.perf_counter()
        output = generation.round(*draft_length.choose())
        widths, kept = zip(*((width, len(out[0])) for width, out in zip(generation.drafted, output) if out))
        draft_length.observe(widths, kept, time.perf_counter() - begun)
        yield output


def generate(target, draft, request, K, version=0):
    """Answers one request -> (its trace, seconds).  K: a number, or the DraftLength that chooses one every round."""
    begun = time.perf_counter()
    draft_length = FixedLength(K) if isinstance(K, int) else K
    generation = Generation(target, draft, [request], draft_length.longest)
    for _ in decode(generation, draft_length):
        pass
    seconds = time.perf_counter() - begun
    return generation.trace(0, version), seconds


def seconds_per_round(target, draft, temperature):
    """Of rounds with 0, 1, .. LONGEST drafted tokens.  A sweep through all of them meets the machine in one mood, so a
    round's share of its sweep counts: the median of nine sweeps, of fewer (two at least) if they take over three seconds.
    Plain rounds follow each other, and the last one counts: after drafting it takes a dozen until the caches hold what they
    read again and again, and no more."""
    context = min(target.config.max_position_embeddings, draft.config.max_position_embeddings)
    prompt = [0] * max(2, min(128, context - 64))  # a sweep drafts and commits less than 64 tokens
    sweeps, started = [], time.perf_counter()
    for _ in tqdm(range(10), desc="timing rounds", leave=False, disable=None, delay=2):
        if len(sweeps) > 2 and time.perf_counter() - started > 3:
            break
        generation = Generation(target, draft, [Request(prompt, 64, 0, temperature)], LONGEST)
        sweeps.append([0.0] * (LONGEST + 1))
        with always_drafting(draft):
            generation.round(LONGEST)  # the draft reads the prompt
            for K in [*range(LONGEST, 0, -1), *[0] * 16]:
                begun = time.perf_counter()
                generation.round(K)
                sweeps[-1][K] = time.perf_counter() - begun
    sweeps = torch.tensor(sweeps[1:], dtype=torch.float64)  # the first one warms up
    share = (sweeps / sweeps.sum(1, keepdim=True)).median(0).values
    return (share * sweeps.sum(1).median() / share.sum()).tolist()


def always_drafting(draft):
    """Where rounds are timed prompt lookup finds something, be it wrong: what finds nothing is a plain round."""
    if not hasattr(draft, "lookup"):
        return nullcontext()
    return patch.object(draft, "lookup", lambda text, K, lookup=draft.lookup: lookup(text, K).clamp(min=0))


# ---- the fast path, chosen once: forwards of fixed shapes, compiled ------------------------------------

ROWS = (9, 5, 1)  # tokens of a compiled pass: those of up to 8 and of up to 4 drafted tokens, plain decoding's
# Inductor's own products, of weights packed once, take a quarter of oneDNN's time in bfloat16; in float32 MKL's are faster
# from a few rows on.
PACKED = {"freezing": True, "cpp.enable_concat_linear": True}
OWN_PRODUCTS = {"max_autotune": True, "max_autotune_gemm_backends": "CPP", "autotune_num_choices_displayed": 0}


def slots_for(tokens):
    """Cache slots of compiled forwards that serve so many tokens: few different numbers, so that torch's cache knows them."""
    return -(-(tokens + SPARE) // 256) * 256


@torch.no_grad()
def compile_forwards(target, drafts, slots, learning=None, cuts=False):
    """Gives the models forwards that torch.compile made, for one request at a time whose caches have `slots` slots; what else
    they are asked for (a prompt, a batch, the learner's replay) goes the old way.  With cuts, top-k or top-p, tokens are
    drawn outside of the graphs.  Where torch cannot compile, UserError, and nothing is changed.

    What never changes has its weights packed into its graphs.  Those of the draft that serves while it is `learning` are
    arguments of its graphs, so what is published by copying into them serves at once.  Do not copy or cast a model
    afterwards, nor change the others' weights or the target's feature_layers."""
    sampling, coins = Sampling([(0.0, 1.0, 0)]), torch.zeros(1, 1, dtype=torch.float64)  # graphs that draw at any temperature
    forwards = [(target, "verify", rows, [], []) for rows in ROWS]  # what comes before a graph's ids, and after its cache
    for draft in drafts:
        if isinstance(draft, Chain):
            like = target.lm_head.weight if draft.feature_layers else torch.zeros(0, dtype=torch.int64)
            width = draft.fc.in_features if draft.feature_layers else 1
            h = draft.lm_head.weight.new_zeros(1, 1, draft.config.hidden_size)
            draws = [] if cuts else [coins, sampling]
            forwards += [(draft, "read" if cuts else "begin", rows, [like.new_zeros(1, rows, width)], [torch.tensor([0]), *draws])
                         for rows in (ROWS[:2] if draft is learning else ROWS[:1])]  # packed, nine are as fast as five
            forwards.append((draft, "extend" if cuts else "go_on", 1, [h], draws))
    models = dict.fromkeys(model for model, *_ in forwards)
    release(models)
    for model in models:
        model.new_cache = lambda batch, length, model=model: type(model).new_cache(
            model, batch, slots if batch == 1 and length + SPARE <= slots else length)
    weights = {model: fingerprint(model) for model in models if model is not learning}
    try:
        for model, name, rows, before, after in tqdm(forwards, desc="compiling", leave=False, disable=None):
            with ExitStack() as settings:
                if model is learning:
                    from torch._inductor.decomposition import fast_random_decomps

                    table = fast_random_decomps()  # torch keeps graphs without regard to it
                    settings.enter_context(patch.dict(table, {torch.ops.aten.mm.default: one_row}))
                    settings.enter_context(torch.compiler.config.patch(cache_key_tag=inspect.getsource(one_row)))
                else:
                    own = rows == 1 or model.lm_head.weight.dtype == torch.bfloat16
                    settings.enter_context(torch._inductor.config.patch(PACKED | (OWN_PRODUCTS if own else {})))
                    # Torch keeps graphs for the next start, but not with weights that oneDNN packed, and it would take one
                    # with other weights of the same shapes for the same graph.
                    settings.enter_context(warnings.catch_warnings(action="ignore", category=UserWarning))
                    settings.enter_context(torch.backends.mkldnn.flags(enabled=False))
                    settings.enter_context(torch.compiler.config.patch(cache_key_tag=weights[model]))
                ids, positions = torch.zeros(1, rows, dtype=torch.int64), torch.arange(rows)[None]
                through_graph(model, name, rows, slots)(*before, ids, positions, model.new_cache(1, 1), *after)
    except Exception as error:  # no compiler, or one that fails: torch has many kinds
        release(models)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--compile: torch cannot compile here ({reason}); leave it out") from error


def release(models):
    """Their methods are their classes' again."""
    for model in models:
        for name in ("verify", "begin", "go_on", "read", "extend", "new_cache"):
            vars(model).pop(name, None)


def one_row(x, weight):
    """The product of one row, x (1, in) and weight (in, out), as a loop over weights as they lie in memory."""
    return (x.T * weight).sum(0, keepdim=True) if x.shape[0] == 1 else NotImplemented


def fingerprint(model):
    """Of all the model's weights and buffers, in hexadecimal."""
    digest = hashlib.blake2b()
    for tensor in [*model.state_dict().values(), *model.buffers()]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def through_graph(model, name, rows, slots):
    """Puts before a model's method (tokens (1, T, ..) .., positions (1, T), cache, ..) -> tensors (1, T or 1, ..) one that
    takes up to `rows` tokens at a time, padded to that many, through a graph of its own; longer ones it leaves to what was
    there before.  Pads stand behind the others, where a cache holds nothing: what they leave is written over."""
    old, function, dtype = getattr(model, name), getattr(type(model), name), model.lm_head.weight.dtype
    # torch keeps graphs with the code, which all models of a class share: a copy of the code keeps them apart.
    own_code = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    # What fits the graph is looked at here, so torch need not look again.
    graph = torch.compile(MethodType(own_code, model), fullgraph=True, dynamic=False,
                          options={"guard_filter_fn": lambda guards: [False] * len(guards)})

    def forward(*args):
        at = next((i for i, x in enumerate(args) if isinstance(x, Cache)), None)
        if at is None or torch.is_grad_enabled() or getattr(args[-1], "cuts", False):
            return old(*args)
        T, keys = args[at - 1].shape[1], args[at].k[0]
        if T > rows or keys.shape[:2] != (1, slots) or keys.dtype != dtype:
            return old(*args)
        *tokens, positions = args[:at]
        if rows > T:
            tokens = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, rows - T)) for x in tokens]
            positions = positions[:, :1] + torch.arange(rows)
        return [x[:, :T] for x in graph(*tokens, positions, *args[at:])]

    setattr(model, name, forward)
    return forward


# ---- python aurora.py --profile: where the time goes ------------------------------------------------------

PARTS = ("target", "draft", "acceptance", "bookkeeping")
PROFILED = (0, 1, 2, 4, LONGEST)
LEFT = 96  # tokens that a profiled request adds to its context


def profile(target, draft, context):
    """{K: medians of the seconds that rounds of K drafted tokens spend in each of PARTS} for K in PROFILED, after `context`
    tokens.  Rounds take turns, so that all meet the machine in one mood; plain ones follow each other, as they do when they
    are all there is: the sooner weights are read again, the more of them are still in the caches."""
    spent, laps = Counter(), {K: [] for K in PROFILED}

    def timed(part, function):
        def run(*args, **more):
            begun = time.perf_counter()
            out = function(*args, **more)
            spent[part] += time.perf_counter() - begun
            return out

        return run

    with ExitStack() as wrappers:
        wrappers.enter_context(always_drafting(draft))
        wrappers.enter_context(patch.object(target.config, "eos_token_ids", ()))  # an answer that ended would leave some lengths untimed
        for part, owner, name in (("target", target, "verify"), ("draft", draft, "propose"), ("acceptance", sys.modules[__name__], "accept")):
            wrappers.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        for seed in range(8):
            generation = Generation(target, draft, [Request([0] * context, LEFT, seed, 0.8)], LONGEST)
            generation.round(LONGEST)  # the draft reads the prompt
            for K in cycle([*PROFILED, *[0] * 16]):
                if K == 1:
                    generation.round(1)  # the draft reads what plain rounds said
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
        if compiled:
            compile_forwards(target, [draft], slots_for(tokens), learning)
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


# ---- python aurora.py --sweep: every draft length beside the one that is found ------------------------------


def print_sweep(target, draft, requests, auto):
    """Every request with every number of drafted tokens, 0 to LONGEST, and with those that `auto` chooses, in turn: tokens
    per second over those of plain decoding (K = 0), a column for each class and one for all of them."""
    rules = {K: FixedLength(K) for K in range(LONGEST + 1)} | {"auto": auto}
    order, tokens, seconds, drafted = list(rules), Counter(), Counter(), []
    for request in tqdm(requests, unit="request", disable=None):
        try:
            served = {K: generate(target, draft, request, rules[K]) for K in order}
        except KeyboardInterrupt:
            if not tokens:
                raise
            print("\ninterrupted: this is what every length has served", file=sys.stderr)
            break
        order.append(order.pop(0))
        drafted.append((served["auto"][0].draft_tokens >= 0).sum(1).float().mean().item())
        for K, (trace, taken) in served.items():
            for kind in (request.kind, None):
                tokens[K, kind] += min(len(trace.ids) - trace.prompt_length, request.max_new_tokens)
                seconds[K, kind] += taken
    kinds = {kind: kind for _, kind in tokens if kind is not None} | {None: "all"}
    rate = {key: tokens[key] / seconds[key] for key in tokens}
    print("K     " + "".join(f"{kind:>10s}" for kind in kinds.values()) + "   tokens/s")
    for K in rules:
        print(f"{K!s:6s}" + "".join(f"{rate[K, kind] / rate[0, kind]:10.2f}" for kind in kinds) + f"{rate[K, None]:11.1f}")
    best = {kind: max(range(LONGEST + 1), key=lambda K: rate[K, kind]) for kind in kinds}
    print(f"\nauto, {statistics.mean(drafted):.1f} drafted tokens a round, over the best fixed K:",
          ", ".join(f"{kinds[kind]} {rate['auto', kind] / rate[K, kind]:.2f} (K = {K})" for kind, K in best.items()))
