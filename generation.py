"""One answer, round by round: draft, verify, commit; and the trace that it leaves behind.

Letters: B batch rows, T tokens, K drafted tokens, R rounds, V vocabulary, D hidden width.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.utils.rnn import pad_sequence

from memory import Memory
from support.draft_length import HEAD, LONGEST, PLAIN, REQUEST, SHARED, Plan
from support.sampling import Sampling
from support.trace import Trace
from verify import accept


@dataclass
class Request:
    prompt: list  # token ids, the begin token included, at least two
    max_new_tokens: int
    seed: int
    temperature: float
    kind: str = "prompts"  # class of traffic
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all


@dataclass
class Drafted:
    source: str
    tokens: torch.Tensor  # (B, K) int64, -1 pads
    logits: torch.Tensor | None  # (B, K, V) what the tokens were drawn from; None: outright
    logprobs: torch.Tensor  # (B, K)
    coins: torch.Tensor  # (B, K+1) what verification draws with


@dataclass
class Round:
    source: str
    drafted: int
    accepted: int
    committed: int  # tokens: those accepted and, unless the answer ended before it, one more


class Generation:
    """Speculative decoding of B requests (Leviathan et al. 2211.17192), round by round.

    Row b has committed `text[b]`.  The target has read all of it but the last token; `unread[b]`
    are the features of what it has read since the draft looked last.  Nothing is ever undone:
    caches are indexed by position, so the next round writes over what was rejected."""

    @torch.inference_mode()
    def __init__(self, target, draft, requests, own_memory=False, shared=None, rule="block"):
        self.target, self.draft, self.requests, self.rule = target, draft, requests, rule
        self.device = target.lm_head.weight.device
        self.generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        laws = [(r.temperature, r.top_p, r.top_k) for r in requests]
        self.sampling = Sampling(laws, self.device)
        self.text = [list(r.prompt) for r in requests]
        self.left = [r.max_new_tokens for r in requests]  # tokens yet to come
        self.rounds, self.pieces = [[] for _ in requests], [[] for _ in requests]
        self.shared, self.guesses = shared, {}
        slots = max(len(r.prompt) + r.max_new_tokens for r in requests)
        self.own = [Memory(slots) for _ in requests] if own_memory else []
        for memory, text in zip(self.own, self.text):
            memory.extend(text)

        self.target_cache = target.new_cache(len(requests), slots)
        self.draft_cache = draft.new_cache(len(requests), slots) if draft else None
        read = [torch.tensor(r.prompt[:-1], device=self.device) for r in requests]
        ids = pad_sequence(read, batch_first=True)
        positions = torch.arange(ids.shape[1], device=self.device).expand(len(requests), -1)
        _, features = target(ids, positions, self.target_cache)
        self.prompt_features = [features[b, : len(ids)] for b, ids in enumerate(read)]
        self.unread = [[f] for f in self.prompt_features]

    @property
    def done(self):
        return not any(self.left)

    def recall(self):
        """Looks the end of the text up -> {source: (length of match, the tokens that followed)},
        of the first row."""
        self.guesses = {}
        if self.own:
            looked = [m.lookup(t, LONGEST[REQUEST]) for m, t in zip(self.own, self.text)]
            self.guesses[REQUEST] = looked
        if self.shared:
            self.guesses[SHARED] = [self.shared.lookup(t, LONGEST[SHARED]) for t in self.text]
        return {source: rows[0] for source, rows in self.guesses.items() if rows[0][1]}

    @torch.inference_mode()
    def draft_tokens(self, plan):
        """Draft: at most plan.K tokens a row.  A chain ends with an end token, and before the last
        token of the answer, which is the target's."""
        K = max(0, min(plan.K, max(self.left) - 1))
        uniforms = [torch.rand(2 * plan.K + 1, generator=g, dtype=torch.float64)
                    for g in self.generators]
        uniforms = torch.stack(uniforms).to(self.device)
        if plan.source == HEAD and K:
            tokens, logits, logprobs = self.draft.propose(
                *self.fresh(), uniforms[:, :K], self.sampling, plan.floors[:K], self.draft_cache)
            self.unread = [[] if n else u for n, u in zip(self.left, self.unread)]
        else:
            rows = self.guesses.get(plan.source) or [(0, [])] * len(self.requests)
            chains = [torch.tensor(tokens[:K], dtype=torch.int64) for _, tokens in rows]
            tokens = pad_sequence(chains, batch_first=True, padding_value=-1).to(self.device)
            logits, logprobs = None, torch.zeros(tokens.shape, device=self.device)
        ends = torch.zeros_like(tokens)
        for end in self.target.config.eos_token_ids:
            ends += tokens == end
        place = torch.arange(tokens.shape[1], device=self.device)
        left = torch.tensor(self.left, device=self.device)[:, None]
        tokens = tokens.masked_fill((ends.cumsum(1) - ends > 0) | (place >= left - 1), -1)
        K = tokens.shape[1]
        coins = torch.cat([uniforms[:, plan.K : plan.K + K], uniforms[:, -1:]], dim=1)
        return Drafted(plan.source, tokens, logits, logprobs, coins)

    @torch.inference_mode()
    def verify(self, drafted):
        """Verify: the target reads the last committed token and the drafted ones, each where it
        stands, and the rule decides -> accepted, own token (B each), what the target thought."""
        B, K = drafted.tokens.shape
        last = torch.tensor([text[-1:] for text in self.text], device=self.device)
        first = torch.tensor([[len(text) - 1] for text in self.text], device=self.device)
        positions = first + torch.arange(K + 1, device=self.device)
        positions = positions.clamp(max=self.target_cache.length - 1)  # pads alone go there
        block = torch.cat([last, drafted.tokens.clamp(min=0)], dim=1)  # (B, K+1)
        hidden, features = self.target(block, positions, self.target_cache)
        logits = self.sampling.filter(self.target.logits(hidden))  # (B, K+1, V)
        accepted, own = accept(logits, drafted.logits, drafted.tokens, drafted.coins,
                               self.sampling.temperature, self.rule)
        return accepted.tolist(), own.tolist(), (hidden, features)

    def commit(self, drafted, accepted, own, thought):
        """Commit: the accepted tokens and the target's own, unless an end token came before it."""
        hidden, features = thought
        ends = self.target.config.eos_token_ids
        for b, tokens in enumerate(drafted.tokens.tolist()):
            if not self.left[b]:  # a finished row stands still
                continue
            n, width = accepted[b], sum(token >= 0 for token in tokens)
            new = tokens[:n] + ([] if n and tokens[n - 1] in ends else [own[b]])
            rows = len(tokens) + 1 if drafted.source == HEAD else len(new)  # rejected ones teach
            self.pieces[b].append((len(self.text[b]) - 2, drafted.tokens[b], drafted.logprobs[b],
                                   hidden[b, :rows], features[b, : len(new)]))
            self.rounds[b].append(Round(drafted.source, width, n, len(new)))
            self.unread[b].append(features[b, : len(new)])
            self.text[b] += new
            self.left[b] = 0 if new[-1] in ends else self.left[b] - len(new)
            if self.own:
                self.own[b].extend(new)

    def fresh(self):
        """What the draft has yet to read, rows padded at their ends: features (B, T, 3D), the text
        from there on (B, T+1), positions (B, T), the index of each row's last one (B,)."""
        features = [torch.cat(f) for f in self.unread]
        lengths = [len(f) for f in features]
        longest = max(lengths)
        tokens = [t[-n - 1 :] + [0] * (longest - n) for t, n in zip(self.text, lengths)]
        first = [[len(t) - n - 1] for t, n in zip(self.text, lengths)]
        positions = torch.tensor(first, device=self.device)
        positions = positions + torch.arange(longest, device=self.device)
        positions = positions.clamp(max=self.target_cache.length - 1)
        last = torch.tensor(lengths, device=self.device) - 1
        tokens = torch.tensor(tokens, device=self.device)
        return pad_sequence(features, batch_first=True), tokens, positions, last

    def answer(self, b=0):
        return self.text[b][len(self.requests[b].prompt) :]

    def trace(self, b=0):
        """What row b leaves to the learner.  Not in inference mode: its tensors meet gradients."""
        r = self.requests[b]
        starts, tokens, logprobs, hidden, features = zip(*self.pieces[b])
        by_head = [round.source == HEAD for round in self.rounds[b]]
        tokens = [t if head else t[:0] for t, head in zip(tokens, by_head)]
        logprobs = [p if head else p[:0] for p, head in zip(logprobs, by_head)]
        committed = [round.committed for round in self.rounds[b]]
        device = self.device
        return Trace(
            ids=torch.tensor(self.text[b], device=device), prompt_length=len(r.prompt),
            features=torch.cat([self.prompt_features[b], *features]),
            starts=torch.tensor(starts, device=device),
            draft_tokens=pad_sequence(tokens, batch_first=True, padding_value=-1),
            behaviour=pad_sequence(logprobs, batch_first=True),
            hidden=pad_sequence(hidden, batch_first=True),
            committed=torch.tensor(committed, device=device), temperature=r.temperature,
            top_p=r.top_p, top_k=r.top_k)


def seconds_per_round(target, draft, temperature, rule="block"):
    """{source: seconds of rounds with 0, 1, .. drafted tokens}, as a DraftLength takes them.

    A machine's speed drifts from one sweep through all of them to the next, but hardly within one:
    so what counts is a round's share of its sweep, the median of at most nine.  Plain rounds follow
    each other, and the last one counts: it takes a dozen until they find in the processor's caches
    what plain rounds find there."""
    sources = ([HEAD] if draft else []) + [REQUEST]
    kinds = [Plan(s, K, [0.0] * K) for s in sources for K in range(LONGEST[s], 0, -1)]
    new = 1 + max(plan.K for plan in kinds)
    context = min(m.config.max_position_embeddings for m in (target, draft) if m)
    prompt = [0] * max(2, min(64, context - new))
    sweeps, started = [], time.perf_counter()
    while len(sweeps) < 10 and (len(sweeps) < 3 or time.perf_counter() - started < 2):
        request = Request(prompt, new, 0, temperature)
        generation = Generation(target, draft, [request], rule=rule)
        times = {}
        for plan in [kinds[0], *kinds, *[Plan()] * 12]:  # in the first, the draft reads the prompt
            generation.guesses = {REQUEST: [(1, [0] * plan.K)]}
            generation.text = [list(prompt)]  # every round is the first, whatever was said
            generation.left = [new]
            begin = time.perf_counter()
            drafts = generation.draft_tokens(plan)
            generation.commit(drafts, *generation.verify(drafts))
            times[plan.source, plan.K] = time.perf_counter() - begin
        sweeps.append(times)
    wholes = [sum(times.values()) for times in sweeps[1:]]  # the first one warms up
    seconds = {}
    for key in sweeps[0]:
        shares = [times[key] / whole for times, whole in zip(sweeps[1:], wholes)]
        seconds[key] = median(shares) * median(wholes)
    plain = [seconds[PLAIN, 0]]
    return {s: plain + [seconds[s, K] for K in range(1, LONGEST[s] + 1)] for s in sources}
