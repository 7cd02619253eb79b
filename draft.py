"""The drafts: what guesses the target's next K tokens.  An EAGLE-3 head, a small language model, or prompt lookup.

All have one interface.  `feature_layers` is what a draft asks of the target (none: the tokens alone); new_cache(B, S) is
its memory of B requests; propose() drafts; `vocabulary` holds the ids that it can say, None for all.  Those that can learn
also replay(): the logits of many rounds anew, with gradient.  How many tokens to draft is DraftLength's to say.

The EAGLE-3 head (Li et al. 2503.01840), `Draft`, is the one that this project is about.  It reads three of the target's
hidden states, so it starts from what the target already knows.  They are fused into one vector g, put beside the embedding
of the token that follows, and go through one transformer layer:

    position t:   g_t = fc(features_t),   token x_{t+1}   ->   layer   ->   h_t   ->   head   ->   draft_q of x_{t+2}

That is step 0 of a round.  The target has not seen what comes next, so step k > 0 puts the layer's own output
h of step k-1 where g stood, and the token drafted at step k-1 where the known token stood, one position on.

Parameter names are those of EAGLE-3 checkpoints.  Departures: the embedding is shared with the target and frozen;
there is one chain and no tree; the layer's cache is indexed by position, like the target's.

Letters: B batch rows, T tokens, K drafted tokens a round, R round starts, V vocabulary, D hidden width,
         H heads, G key/value heads, E head width, S cache slots.
"""

import copy
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import nn

from model import MLP, Attention, Cache, RMSNorm, Transformer, UserError, add_tables, attend, fill, load, rope_and_mask


PRIOR = 0.7  # acceptance of a place of which nothing is known
PROBING = 0.005  # of the last thousand rounds' time: what probing may lose of it
AFRESH = 6  # plain rounds: what probing may lose at the beginning of an answer, if the draft is always accepted in the long run
BONUS, BONUS_ROUNDS = 1.2, 20  # chains that stop early are taken to make a fifth more than the best fixed length, as if seen so often


def decay_and_add(counts, memory, accepted, tested):
    """Adds to [acceptances, tests], after so much of them was remembered."""
    counts[:] = memory * counts[0] + accepted, memory * counts[1] + tested


class FixedLength:
    """Always draft K tokens."""

    def __init__(self, K):
        self.longest = K

    def begin(self):
        pass

    def choose(self):
        return self.longest, None

    def observe(self, drafted, accepted, seconds):
        pass

    def trust(self, acceptance):
        pass

    def __str__(self):
        return f"K = {self.longest}"


class DraftLength:
    """Chooses how many tokens to draft, for the most tokens per second.

    a_j is a running estimate of how often place j of a chain is accepted, given that those before it were; S_k = a_1 .. a_k.
    With K drafted tokens a round yields (1 + S_1 + .. + S_K) / seconds[K] tokens a second; K = 0 is plain decoding.
    seconds: measured, of a round with K = 0, 1, .. longest drafted tokens.

    A draft that `stops_early` knows the probability of every token that it drew, and what it doubts is seldom accepted.
    After k tokens that have probability c together (its confidence), going on to m > k of them adds c (S_{k+1} + .. + S_m) / S_k
    tokens to expect and takes seconds[m] - seconds[k].  It stops when no m is worth its time at the rate, in tokens per
    second, of recent rounds that drafted.  That rate, which begins as an optimistic guess (`drafting`), also says whether
    drafting pays at all.  Either way is lossless, since whether a place is drafted never depends on the token that will stand there.

    Where drafting does not pay, a round probes now and then: K = 1 or, of a draft that stops early, as long as it is
    confident.  By `seconds`, probes lose PROBING of the time to plain decoding, no more; where drafting nearly pays that is many
    probes, and hardly any where it is worthless.  Not counted is what the draft then has to read, all that was said since the
    last probe.  Every answer is another text, so it begins with probes, the more the better the draft was in the long run.  A
    place that was hardly tested of late is taken to be as it was in the long run, so that after text that was too hard for it a
    good draft soon tries again."""

    def __init__(self, seconds, stops_early=False):
        self.longest, self.seconds, self.stops_early, self.pays = len(seconds) - 1, seconds, stops_early, True
        self.long_run, self.recent = ([[0.0, 0.0] for _ in range(self.longest)] for _ in range(2))  # acceptances and tests of each place
        self.recent_tokens = self.recent_seconds = 0.0  # of rounds that drafted
        self.spent = self.probed = 0.0  # seconds of the last thousand rounds or so; how many of them probing lost

    def survival(self):
        """S_1, S_2, ..; a place that was hardly reached of late is as in the long run, and one that never was like the one before it."""
        a, S, out = PRIOR, 1.0, []
        for place in zip(self.long_run, self.recent):
            for accepted, tested in place:
                a = (accepted + 5 * a) / (tested + 5)
            S *= a
            out.append(S)
        return out

    def rates(self):
        """Tokens per second to expect at K = 0, 1, .. longest."""
        S = self.survival()
        return [(1 + sum(S[:K])) / t for K, t in enumerate(self.seconds)]

    def drafting(self, rates):
        """Tokens per second to expect of rounds that draft: what they made of late and, as BONUS_ROUNDS more, BONUS times what the
        best fixed length promises, which is what stopping early should beat."""
        K = max(range(1, self.longest + 1), key=rates.__getitem__)
        if not self.stops_early:
            return rates[K]
        guessed = BONUS_ROUNDS * self.seconds[K]
        return (BONUS * rates[K] * guessed + self.recent_tokens) / (guessed + self.recent_seconds)

    def begin(self):
        """Another answer: probes have credit again, the more the oftener first tokens were accepted in the long run."""
        accepted, tested = self.long_run[0]
        acceptance = (accepted + 5 * PRIOR) / (tested + 5)
        self.probed = min(self.probed, PROBING * self.spent - AFRESH * acceptance**2 * self.seconds[0])

    def choose(self):
        """-> the most tokens that the next round may draft; and if it may stop early the confidence, after 1, 2, .. tokens, below
        which it does, else None."""
        rates = self.rates()
        rate, S, t = self.drafting(rates), self.survival(), self.seconds
        self.pays = rate > rates[0]
        if not self.pays and self.probed >= PROBING * self.spent:
            return 0, None
        if not self.stops_early:
            return rates.index(rate) if self.pays else 1, None
        return self.longest, [min(rate * (t[m] - t[k]) * S[k - 1] / sum(S[k:m]) for m in range(k + 1, self.longest + 1))
                              for k in range(1, self.longest)]

    def observe(self, drafted, accepted, seconds):
        """A round took `seconds`; of each row, how many tokens it drafted and how many of them were accepted."""
        made = 1 + sum(accepted) / len(accepted)  # tokens a row; plain decoding takes seconds[0] for each
        lost = 0.0 if self.pays else 1 - made * self.seconds[0] / self.seconds[max(drafted)]  # a share: machines change their speed
        self.spent, self.probed = 0.999 * self.spent + seconds, 0.999 * self.probed + seconds * lost
        for K, n in zip(drafted, accepted):
            self.recent_tokens = 0.99 * self.recent_tokens + (n + 1 if K else 0)  # forgotten with every round, drafted or not: text changes
            self.recent_seconds = 0.99 * self.recent_seconds + (self.seconds[K] if K else 0)
            for j, (long_run, recent) in enumerate(zip(self.long_run, self.recent)):
                tested = j < min(n + 1, K)
                decay_and_add(recent, 0.95 if K and not tested else 0.99, j < n, tested)  # what is not tested is sooner worth another test
                decay_and_add(long_run, 0.998 if tested else 1.0, j < n, tested)

    def trust(self, acceptance, tests=10.0):
        """Another draft serves, whose places the learner estimates, on one answer, to be accepted so often: that is as good as so
        many tests, and what was seen of the draft before it counts less."""
        self.recent_tokens, self.recent_seconds = 0.7 * self.recent_tokens, 0.7 * self.recent_seconds
        for long_run, recent, a in zip_longest(self.long_run, self.recent, acceptance[: self.longest]):
            decay_and_add(long_run, 0.8, *((0, 0) if a is None else (tests * a, tests)))
            decay_and_add(recent, 0.7, 0, 0)

    def __str__(self):
        ratios = " ".join(f"{t / self.seconds[0]:.2f}" for t in self.seconds[1:])
        return f"K = 0..{self.longest}, a round of 1.. costs {ratios} plain tokens of {1e3 * self.seconds[0]:.1f} ms"


class Midlayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, input_size=2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention_input(self, g, embedded):
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(g)], dim=-1)  # (..., 2D)

    def after_attention(self, g, attended):
        h = g + attended
        return h + self.mlp(self.post_attention_layernorm(h))


class Chain:
    """Drafts one token after the other, for drafts that can `read` and `extend`; they have a config and a vocabulary.

    `begin` and `go_on` are `read` and `extend` and the draw of a token, so that one compiled graph holds both
    (serve.compile_forwards)."""

    def begin(self, features, ids, positions, cache, last, coins, sampling):
        """The first token of a round -> h (B, 1, D), and of `draw`: logits (B, 1, V), token and its log-probability (B, 1)."""
        h, logits = self.read(features, ids, positions, cache, last)
        return h, *self.draw(logits, coins, sampling)

    def go_on(self, h, ids, positions, cache, coins, sampling):
        """The next token: h and ids (B, 1) are what the last step returned."""
        h, logits = self.extend(h, ids, positions, cache)
        return h, *self.draw(logits, coins, sampling)

    def draw(self, logits, coins, sampling):
        logits, token, logprob = sampling.draw(logits, coins)
        return logits, token if self.vocabulary is None else self.vocabulary[token], logprob

    @torch.no_grad()
    def propose(self, features, ids, positions, last, coins, sampling, cache, min_confidence=None):
        """Draft K tokens for every row, or fewer.

        features (B, T, 3D), ids (B, T), positions (B, T): what the target has read since the last round, each
            position with the token that follows it.  They overwrite what the draft had put there from its own
            guesses.  Row b's true entries are 0..last[b]; what comes after is padding and is written over.
        coins (B, K) float64, one uniform per drafted token; sampling: verify.Sampling of these rows.
        min_confidence: K-1 numbers; a row stops after k tokens if the draft gives them together less than the kth of these for a
            probability; -1 pads the rows that stop before others do.  None: no row stops.
        Returns draft_tokens (B, K) int64, draft_logits (B, K, V), exactly what they were drawn from: -inf where top-k and
        top-p cut, and at the ids that the draft cannot say, and the tokens' log-probabilities (B, K) float32.
        """
        h, *step = self.begin(features, ids, positions, cache, last, coins[:, :1], sampling)
        steps, position, confidence = [step], positions.gather(1, last[:, None]), 1.0
        stopped = torch.zeros_like(step[1], dtype=torch.bool)
        for k in range(1, coins.shape[1]):
            if min_confidence:
                confidence = confidence * sampling.confidence(step[0], step[2])
                stopped = stopped | (confidence < min_confidence[k - 1])
                if stopped.all():
                    break
            h, *step = self.go_on(h, step[1], position + k, cache, coins[:, k : k + 1], sampling)
            logits, token, logprob = step
            steps.append([logits, token.masked_fill(stopped, -1), logprob.masked_fill(stopped, 0.0)] if min_confidence else step)
        logits, tokens, logprobs = (torch.cat(x, dim=1) for x in zip(*steps))
        if self.vocabulary is not None:
            everything = logits.new_full((*tokens.shape, self.config.vocab_size), float("-inf"))
            logits = everything.index_copy_(-1, self.vocabulary, logits)
        return tokens, logits, logprobs


OWN_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # the rest a head has from its target


def slim(config):
    """One layer with half the heads of the target's layers and a third of their MLP.  A draft runs K times a round, so what
    it reads counts K times."""
    G = max(1, config.num_key_value_heads // 2)
    H = max(1, config.num_attention_heads // 2 // G) * G
    third = config.intermediate_size // 3
    return replace(config, num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=G,
                   intermediate_size=third - third % 64 if third > 64 else max(1, third),
                   attention_bias=False, output_bias=False, qk_norm=False, tie_word_embeddings=False)


class Draft(Chain, nn.Module):
    def __init__(self, target, config=None, vocabulary=None):
        """Day 0: random weights, the target's embedding (the same memory, frozen) and a copy of its head (trainable).

        vocabulary (V_draft,) int64, ascending: the ids that the draft can say, fixed for its life.  A large vocabulary is
        most of a draft's cost, and its rare ids earn little.  config: of a head that is there already."""
        super().__init__()
        self.kind, self.own_embedding = "head", False
        self.feature_layers = target.feature_layers
        config = config or slim(target.config)
        if target.config.num_hidden_layers < 7:
            raise UserError(f"an EAGLE-3 draft reads what enters layers 2, L//2 and L-3, which are three different "
                            f"layers only if L >= 7: this target has {target.config.num_hidden_layers} layers")
        self.config, D = config, config.hidden_size
        self.fc = nn.Linear(3 * D, D, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.vocab_size if vocabulary is None else len(vocabulary), bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        head = target.lm_head.weight if vocabulary is None else target.lm_head.weight[vocabulary]
        with torch.no_grad():
            self.lm_head.weight.copy_(head)
            self.norm.weight.copy_(target.model.norm.weight)
        self.embed_tokens = nn.Embedding.from_pretrained(target.model.embed_tokens.weight.detach(), freeze=True)
        self.register_buffer("vocabulary", vocabulary)
        add_tables(self, config)

    def embed(self, ids, dtype):
        return self.embed_tokens(ids).to(dtype)

    def logits(self, h):
        """h (..., D) -> (..., V), the suppressed ids at -inf; (..., V_draft) of a draft with a vocabulary of its own."""
        logits = self.lm_head(self.norm(h))
        return logits.index_fill_(-1, self.suppressed, float("-inf")) if self.vocabulary is None else logits

    def step(self, g, ids, positions, cache, last=None):
        """One pass of the layer over the cache: g (B, T, D), ids (B, T), positions (B, T) -> h (B, T, D); with last (B,),
        h (B, 1, D) of those tokens alone, the others leaving their keys and values."""
        cos, sin, mask = rope_and_mask(self, positions, cache, g.dtype)
        x = self.midlayer.attention_input(g, self.embed(ids, g.dtype))
        attended = self.midlayer.self_attn(x, cos, sin, mask, positions, cache, 0, last)
        if last is not None:
            g = g[cache.rows[:, 0], last][:, None]
        return self.midlayer.after_attention(g, attended)

    def read(self, features, ids, positions, cache, last):
        """Step 0: what the target has read since the last round -> h (B, 1, D) of each row's last token, logits (B, 1, V)."""
        h = self.step(self.fc(features.to(self.fc.weight.dtype)), ids, positions, cache, last)
        return h, self.logits(h)

    def extend(self, h, ids, positions, cache):
        """Step k > 0: h (B, 1, D) of step k-1 and the token drafted there (B, 1) -> h, logits."""
        h = self.step(h, ids, positions, cache)
        return h, self.logits(h)

    def replay(self, features, ids, starts, chains):
        """The logits of many rounds at once, with gradient: what `propose` computed, without its cache.

        features (B, T, 3D) and ids (B, T): a sequence, each position with the token that follows it.
        starts (B, R): the position of each round's step 0.  chains (B, R, K-1): the tokens fed at steps 1..K-1.
        Returns (B, R, K, V), or (B, R, K, V_draft + 1) with a vocabulary of its own: the last column, -inf, stands for all
        the ids that the draft cannot say.  The rounds are the query axis of one attention, whose first T keys, those of
        step 0, they share; every further step adds R keys, of which a round may read its own."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        row = torch.arange(len(ids), device=ids.device)[:, None]
        T, R, K = ids.shape[1], starts.shape[1], chains.shape[2] + 1

        def qkv(g, ids, positions):  # q (B, H, .., E), k and v (B, G, .., E)
            cos, sin = (t[positions][:, :, None].to(g.dtype) for t in (self.cos, self.sin))
            return [x.transpose(1, 2) for x in attention.qkv(layer.attention_input(g, self.embed(ids, g.dtype)), cos, sin)]

        g = self.fc(features.to(self.fc.weight.dtype))
        q, keys, values = qkv(g, ids, torch.arange(T, device=ids.device)[None])
        g, q = g[row, starts], q.transpose(1, 2)[row, starts].transpose(1, 2)  # (B, R, D), (B, H, R, E)
        past = torch.arange(T, device=ids.device) <= starts[..., None]  # (B, R, T)
        own = torch.eye(R, dtype=torch.bool, device=ids.device).expand(len(ids), R, R)
        mask = torch.zeros((), dtype=g.dtype, device=ids.device).where(torch.cat([past] + [own] * (K - 1), dim=-1), float("-inf"))

        logits = []
        for k in range(K):
            if k > 0:
                q, key, value = qkv(g, chains[:, :, k - 1], starts + k)
                keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            out = attend(q, keys, values, attn_mask=mask[:, None, :, : keys.shape[2]], enable_gqa=q.shape[1] != keys.shape[1])
            g = layer.after_attention(g, attention.o_proj(out.transpose(1, 2).flatten(2)))  # (B, R, D)
            logits.append(self.logits(g))
        logits = torch.stack(logits, dim=2)
        return logits if self.vocabulary is None else nn.functional.pad(logits, (0, 1), value=float("-inf"))

    def new_cache(self, batch, length):
        return Cache(self.config, batch, length, self.fc.weight.device, self.fc.weight.dtype)


class SmallModel(Chain, Transformer):
    """A small language model with the target's vocabulary.  It needs nothing of the target but the tokens that it read,
    and it learns like the head does: all of it."""

    kind = "small model"

    def __init__(self, config):
        super().__init__(config)
        self.feature_layers, self.vocabulary = (), None

    def read(self, features, ids, positions, cache, last):
        """As Draft.read; features (B, T, 1) are the tokens at `positions`, ids those that follow them."""
        ids = torch.cat([features[:, :1, 0], ids], dim=1)  # the first of them was read before, unless it begins the prompt: no harm
        hidden, _ = self(ids, torch.cat([positions[:, :1], positions + 1], dim=1), cache)
        h = hidden[cache.rows[:, 0], last + 1][:, None]
        return h, self.logits(h)

    def extend(self, h, ids, positions, cache):
        """As Draft.extend; what it knows of the text is in its cache, so h is not read."""
        h, _ = self(ids, positions + 1, cache)
        return h, self.logits(h)

    def replay(self, features, ids, starts, chains):
        """As Draft.replay, in one forward of the text and, after it, all the chains.  A drafted token sees the text up to
        its round's start and the tokens drafted before it, and stands where it stood."""
        text = torch.cat([features[:, :1, 0], ids], dim=1)  # (B, T+1)
        B, R, steps = chains.shape
        T, device = text.shape[1], ids.device
        step = torch.arange(steps, device=device)
        positions = torch.cat([torch.arange(T, device=device).expand(B, -1), (starts[..., None] + 2 + step).flatten(1)], dim=1)
        round_of = torch.arange(R, device=device).repeat_interleave(steps)
        step_of = step.repeat(R)
        own = (round_of[:, None] == round_of) & (step_of[:, None] >= step_of)  # (R * steps, R * steps)
        before = torch.arange(T, device=device) <= (starts + 1).repeat_interleave(steps, 1)[..., None]  # (B, R * steps, T)
        reads = torch.zeros(B, *2 * [T + R * steps], dtype=torch.bool, device=device)
        reads[:, :T, :T] = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        reads[:, T:, :T], reads[:, T:, T:] = before, own
        dtype = self.lm_head.weight.dtype
        mask = torch.zeros((), dtype=dtype, device=device).where(reads, float("-inf"))[:, None]
        hidden, _ = self(torch.cat([text, chains.flatten(1)], dim=1), positions, mask=mask)
        first = hidden[torch.arange(B, device=device)[:, None], starts + 1][:, :, None]  # (B, R, 1, D)
        return self.logits(torch.cat([first, hidden[:, T:].unflatten(1, (R, steps))], dim=2))


class NGram(nn.Module):
    """Prompt lookup: propose what followed the last `longest` tokens where they stood before (or else the last two, or
    one).  No weights, nothing to learn, and hard to beat where a text repeats itself."""

    def __init__(self, config, longest=3):
        super().__init__()
        self.config, self.longest, self.feature_layers, self.vocabulary = config, longest, None, None

    def new_cache(self, batch, length):
        return torch.zeros(batch, length, dtype=torch.int64)  # the text, token by token

    def propose(self, features, ids, positions, last, coins, sampling, cache, min_confidence=None):
        """As Chain.propose, but outright: no logits, and a log-probability of 0; -1 where nothing was found, no tokens if no row
        found any.  min_confidence is not read."""
        cache[torch.arange(len(ids))[:, None], positions.cpu() + 1] = ids.cpu()
        ends = positions.gather(1, last[:, None])[:, 0].tolist()
        found = [self.lookup(text[1 : end + 2], coins.shape[1]) for text, end in zip(cache, ends)]
        tokens = torch.stack(found).to(ids.device)
        if (tokens < 0).all():
            tokens = tokens[:, :0]  # plain decoding
        return tokens, None, torch.zeros(tokens.shape, device=ids.device)

    def lookup(self, text, K):
        """(K,) int64.  The latest match counts, and a copy that reaches the end of the text goes on with itself."""
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            matches = (text.unfold(0, n, 1)[:-1] == text[-n:]).all(1).nonzero()
            if len(matches):
                start = int(matches[-1]) + n
                return text[start + torch.arange(K) % (len(text) - start)]
        return torch.full((K,), -1)


def load_draft(path, target):
    """A draft that was trained for this target -> (draft, record)."""
    config, weights, record = load(path)
    if config.vocab_size != target.config.vocab_size:
        raise UserError(f"{path}: the draft's vocabulary is {config.vocab_size}, the target's {target.config.vocab_size}: "
                        "a draft serves the target it was made for")
    if record.get("kind") == SmallModel.kind:  # its file looks like a target's, so it says what it is
        return fill(SmallModel(config), weights, path), record
    kind, like = record.get("kind", "head"), slim(target.config)
    own_sizes = OWN_SIZES if kind == "head" else set(vars(config)) - {"hidden_size"}  # of a head made elsewhere
    differing = [name for name, value in vars(config).items() if name not in own_sizes and value != getattr(like, name)]
    if differing:
        raise UserError(f"{path}: the draft was made for another target: they differ in {', '.join(differing)}")
    draft = Draft(target, config, weights.get("vocabulary"))
    draft.kind = kind
    return fill_draft(draft, weights, path), record


def twin(draft):
    """A copy with weights of its own; an embedding that is the target's stays the target's."""
    shared = None if getattr(draft, "own_embedding", True) else draft.embed_tokens
    return copy.deepcopy(draft, {id(shared): shared})


def fill_draft(draft, weights, path):
    """`fill` for a head whose embedding is the target's own memory: another embedding gets memory of its own."""
    embedding, shared = weights.get("embed_tokens.weight"), draft.embed_tokens.weight
    draft.own_embedding = not (embedding is None or embedding.shape == shared.shape and torch.equal(embedding.to(shared), shared))
    if not draft.own_embedding:
        weights = weights | {"embed_tokens.weight": shared}
    else:
        draft.embed_tokens = nn.Embedding.from_pretrained(torch.empty_like(shared, dtype=draft.fc.weight.dtype))
    return fill(draft, weights, path)
