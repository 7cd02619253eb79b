"""The draft: a small head on the target that guesses the next K tokens, one after the other.

EAGLE-3's head (Li et al. 2503.01840) reads three of the target's hidden states, so it starts from
what the target already knows.  They are fused into one vector g, put beside the embedding of the
token that follows, and go through one transformer layer:

    position t:   g_t = fc(features_t),  token x_{t+1}  ->  layer  ->  h_t  ->  draft_q of x_{t+2}

That is step 0 of a round.  The target has not seen what comes next, so step k > 0 puts the layer's
own output h of step k-1 where g stood, and the token drafted at step k-1 where the known token
stood, one position on.

Parameters bear the names of EAGLE-3 checkpoints.  Departures: the embedding is the target's own and
frozen; there is one chain and no tree; the layer's cache is indexed by position, like the target's.

Letters: B batch rows, T tokens, K drafted tokens a round, R round starts, V vocabulary,
         D hidden width, H heads, G key/value heads, E head width.
"""

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from model import MLP, Attention, Cache, UserError, additive, register_tables, rope_at
from support.store import fill, load


class Proposer:
    """What every draft can do: propose a chain, one token after the other, given that it can

    read(features, tokens, positions, last, cache) -> h (B, 1, D), logits (B, 1, V): step 0,
    extend(h, token, position, cache) -> h, logits: the next step, token and position (B, 1).

    `vocabulary` (V_draft,) int64, ascending, holds the ids that it can say; None: all."""

    def propose(self, features, tokens, positions, last, coins, sampling, floors, cache):
        """Drafts up to K tokens for every row.

        features (B, T, 3D), positions (B, T), tokens (B, T+1): what the target has read since the
            last round, and the text from there on, one token longer than what was read.  In the
            draft's cache it takes the place of the draft's own guesses.  Row b's true entries are
            0..last[b]; what comes after is padding, and is written over in turn.
        coins (B, K) float64, one a token; sampling: support.sampling.Sampling of these rows.
        floors (K,): a row stops after token k if the product of its tokens' probabilities is below
            the kth of these; a rule on drafted tokens alone, as verification needs it.

        Returns draft_tokens (B, K) int64, -1 where a row had stopped; draft_logits (B, K, V), what
        they were drawn from: -inf where top-k and top-p cut and at ids that the draft cannot say;
        and the tokens' log-probabilities (B, K) float32.  K is less if all rows have stopped."""
        h, logits = self.read(features, tokens, positions, last, cache)
        position, confidence, steps = positions.gather(1, last[:, None]), 1.0, []
        drafting = torch.ones_like(last, dtype=torch.bool)
        for k, floor in enumerate(floors):
            filtered, token, logprob, sure = sampling.draw(logits[:, 0], coins[:, k])
            token = token if self.vocabulary is None else self.vocabulary[token]
            steps.append((token.where(drafting, -1), filtered, logprob.where(drafting, 0.0)))
            confidence = confidence * sure
            drafting = drafting & (confidence >= floor)
            if k + 1 == len(floors) or not drafting.any():
                break
            ahead = (position + k + 1).clamp(max=cache.length - 1)  # only rows that have stopped
            h, logits = self.extend(h, token[:, None], ahead, cache)
        tokens, logits, logprobs = (torch.stack(x, dim=1) for x in zip(*steps))
        if self.vocabulary is not None:
            everything = logits.new_full((*tokens.shape, self.config.vocab_size), float("-inf"))
            logits = everything.index_copy_(-1, self.vocabulary, logits)
        return tokens, logits, logprobs

    def clone(self):
        """A copy with weights of its own.  Buffers are constants, and shared."""
        return copy.deepcopy(self, {id(buffer): buffer for buffer in self.buffers()})


class Midlayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, input_size=2 * config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention_input(self, g, embedded):
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(g)], dim=-1)  # (.., 2D)

    def after_attention(self, g, attended):
        h = g + attended
        return h + self.mlp(self.post_attention_layernorm(h))


def head_config(config):
    """One layer with half the heads of the target's layers and a third of their MLP: a draft runs K
    times a round, so what it reads counts K times."""
    G = max(1, config.num_key_value_heads // 2)
    H = max(1, config.num_attention_heads // 2 // G) * G
    third = config.intermediate_size // 3
    return replace(
        config, num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=G,
        intermediate_size=third - third % 64 if third > 64 else max(1, third),
        attention_bias=False, output_bias=False, qk_norm=False, tie_word_embeddings=False,
    )


class Draft(Proposer, nn.Module):
    def __init__(self, target, config=None, vocabulary=None):
        """Random weights; the head begins as a copy of the target's.

        config: of a head that exists already.  vocabulary (V_draft,) is fixed for the draft's life:
        a large vocabulary is most of a draft's cost, and its rare ids earn little."""
        super().__init__()
        if target.config.num_hidden_layers < 7:
            layers = target.config.num_hidden_layers
            raise UserError(
                f"an EAGLE-3 draft reads what enters layers 2, L//2 and L-3, which are three "
                f"different layers only if L >= 7: this target has {layers} layers"
            )
        self.config = config = config or head_config(target.config)
        D, V = config.hidden_size, config.vocab_size if vocabulary is None else len(vocabulary)
        self.fc = nn.Linear(3 * D, D, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        with torch.no_grad():
            head = target.lm_head.weight
            self.lm_head.weight.copy_(head if vocabulary is None else head[vocabulary])
            self.norm.weight.copy_(target.model.norm.weight)
        embedding = target.model.embed_tokens.weight.detach()  # the same memory
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("vocabulary", vocabulary)
        register_tables(self, config)

    def embed(self, ids):
        return F.embedding(ids, self.embedding).to(self.fc.weight.dtype)

    def logits(self, h):
        """h (.., D) -> (.., V), the suppressed ids at -inf; (.., V_draft) if pruned."""
        logits = self.lm_head(self.norm(h))
        pruned = self.vocabulary is not None
        return logits if pruned else logits.index_fill_(-1, self.suppressed, float("-inf"))

    def step(self, g, ids, positions, cache):
        """The layer over the cache: g (B, T, D), ids (B, T), positions (B, T) -> h (B, T, D)."""
        x = self.midlayer.attention_input(g, self.embed(ids))
        cos, sin = rope_at(self, positions, g.dtype)
        mask = cache.mask(positions, g.dtype)
        return self.midlayer.after_attention(
            g, self.midlayer.self_attn(x, cos, sin, mask, positions, cache)
        )

    def read(self, features, tokens, positions, last, cache):
        g = self.fc(features.to(self.fc.weight.dtype))
        h = self.step(g, tokens[:, 1:], positions, cache)
        h = h[cache.rows, last[:, None]]  # (B, 1, D)
        return h, self.logits(h)

    def extend(self, h, token, position, cache):
        h = self.step(h, token, position, cache)
        return h, self.logits(h)

    def replay(self, features, tokens, starts, chains):
        """What `propose` computed for many rounds, at once, with gradient and without a cache.

        features (B, T, 3D), tokens (B, T+1): the text, one longer than what the target read.
        starts (B, R): the position of each round's step 0.  chains (B, R, K-1): the tokens that
        were fed at steps 1..K-1.  Returns logits (B, R, K, V), or (B, R, K, V_draft + 1) if pruned:
        the last column, -inf, stands for all the ids that the draft cannot say.

        The rounds are the query axis of one attention: the T keys of step 0 they share, and every
        further step adds R keys, of which a round may read its own."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
        position = torch.arange(features.shape[1], device=tokens.device)[None]
        R, K = starts.shape[1], chains.shape[2] + 1

        def qkv(g, ids, positions):
            x = layer.attention_input(g, self.embed(ids))
            return attention.qkv(x, *rope_at(self, positions, x.dtype))

        g = self.fc(features.to(self.fc.weight.dtype))
        q, keys, values = qkv(g, tokens[:, 1:], position)
        g, q = g[row, starts], q[row, starts]  # (B, R, D), (B, R, H, E)
        past = position <= starts[..., None]  # (B, R, T)
        own = torch.eye(R, dtype=torch.bool, device=tokens.device).expand(len(tokens), R, R)
        mask = additive(torch.cat([past] + [own] * (K - 1), dim=-1), q.dtype)[:, None]

        steps = []
        for k in range(K):
            if k > 0:
                q, key, value = qkv(g, chains[:, :, k - 1], starts + k)
                keys, values = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
            attended = attention.mix(q, keys, values, mask[..., : keys.shape[1]])
            g = layer.after_attention(g, attended)  # (B, R, D)
            steps.append(g)
        logits = self.logits(torch.stack(steps, dim=2))  # (B, R, K, V): one product for all of them
        return logits if self.vocabulary is None else F.pad(logits, (0, 1), value=float("-inf"))

    def new_cache(self, batch, length):
        weight = self.fc.weight
        return Cache(self.config, batch, length, weight.device, weight.dtype)


def head_from(weights, config, target, path):
    """Weights under EAGLE-3's names -> the head that they make on this target."""
    for name in ("vocab_size", "hidden_size"):
        own, wanted = getattr(config, name), getattr(target.config, name)
        if own != wanted:
            raise UserError(f"{path} is a draft for another target: {name} is {own}, not {wanted}")
    embedding = weights.pop("embed_tokens.weight", None)
    shared = target.model.embed_tokens.weight
    if embedding is not None and not torch.equal(embedding.to(shared), shared):
        raise UserError(f"{path} has an embedding of its own; only the target's is supported")
    vocabulary = weights.get("vocabulary")
    if vocabulary is not None:
        ids = vocabulary.tolist() if vocabulary.dtype == torch.int64 else []
        if not ids or ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < config.vocab_size:
            raise UserError(f"{path}: its vocabulary is no ascending list of the target's ids")
    return fill(Draft(target, config, vocabulary), weights, path)


def load_draft(path, target):
    """A head that was trained for this target -> (draft, record)."""
    config, weights, record = load(path)
    return head_from(weights, config, target, path), record
