"""One Llama-family transformer, for targets and drafts alike.

RMSNorm, rotate-half RoPE, grouped-query attention, SwiGLU; parameters bear the names of Hugging
Face's Llama.  Keys and values live in a cache indexed by position, so rolling back is nothing but
going on from an earlier position: what stands there is written over.

Letters: B batch rows, T tokens of this call, S cache slots, V vocabulary, D hidden width,
         H heads, G key/value heads, E head width, L layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class UserError(Exception):
    """What the user gave cannot be used: aurora.py prints the message and exits with code 2."""


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    output_bias: bool = False  # and on o (Llama with attention_bias)
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE (Qwen3)
    bos_token_id: int | None = None  # prepended to every prompt
    suppress_tokens: tuple = ()  # ids that are never proposed nor emitted
    eos_token_ids: tuple = ()  # ids that end an answer
    rope_scaling: dict | None = None  # Llama 3's, under the names of its config.json


# ---- positions and the cache ---------------------------------------------------------------------


def rope_table(config, length, device=None):
    """cos and sin, each (length, E) float32, for positions 0..length-1.

    Llama 3 stretches by `factor` what turns less than low_freq_factor times within the context of
    its first training, leaves alone what turns more than high_freq_factor times, and blends the
    frequencies in between."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    period = config.rope_theta**exponent  # (E/2,) positions per radian
    if config.rope_scaling:
        c = config.rope_scaling
        turns = c["original_max_position_embeddings"] / (2 * torch.pi * period)
        band = c["high_freq_factor"] - c["low_freq_factor"]
        fast = ((turns - c["low_freq_factor"]) / band).clamp(0, 1)
        period = period / (fast + (1 - fast) / c["factor"])
    angles = torch.arange(length, device=device).float()[:, None] / period  # (length, E/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def register_tables(model, config):
    """The buffers that follow from the configuration: RoPE's, and the ids that are never said."""
    cos, sin = rope_table(config, config.max_position_embeddings)
    model.register_buffer("cos", cos, persistent=False)
    model.register_buffer("sin", sin, persistent=False)
    suppressed = torch.tensor(config.suppress_tokens, dtype=torch.int64)
    model.register_buffer("suppressed", suppressed, persistent=False)


def rope_at(model, positions, dtype):
    """cos and sin (B, T, 1, E) of tokens at positions (B, T)."""
    return (F.embedding(positions, table)[:, :, None].to(dtype) for table in (model.cos, model.sin))


def rotate(x, cos, sin):
    """Rotate-half RoPE: x (B, T, heads, E); cos, sin (B or 1, T, 1, E), in x's dtype."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-right, left], dim=-1), sin)


def additive(reads, dtype):
    """reads (...) bool -> what attention adds to its scores: 0 where true, -inf elsewhere."""
    mask = torch.zeros(reads.shape, dtype=dtype, device=reads.device)
    return mask.masked_fill_(~reads, float("-inf"))


class Cache:
    """Keys and values, (B, S, G, E) a layer, slot = position.  Past a row's position is garbage."""

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.rows, self.length = torch.arange(batch, device=device)[:, None], length

    def mask(self, positions, dtype):
        """(B, 1, T, S) for tokens at positions (B, T): each reads itself and what is before it."""
        slots = torch.arange(int(positions.max()) + 1, device=positions.device)
        return additive(slots <= positions[..., None], dtype)[:, None]

    def update(self, layer, positions, k, v, slots):
        """Writes k and v (B, T, G, E) where they stand -> all of the first `slots` slots."""
        self.k[layer][self.rows, positions] = k
        self.v[layer][self.rows, positions] = v
        return self.k[layer][:, :slots], self.v[layer][:, :slots]


# ---- layers --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config, input_size=None):
        super().__init__()
        width, D, E = input_size or config.hidden_size, config.hidden_size, config.head_dim
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.head_dim = E
        self.attend = F.scaled_dot_product_attention
        self.q_proj = nn.Linear(width, H * E, bias=bias)
        self.k_proj = nn.Linear(width, G * E, bias=bias)
        self.v_proj = nn.Linear(width, G * E, bias=bias)
        self.o_proj = nn.Linear(H * E, D, bias=config.output_bias)
        norm = config.qk_norm
        self.q_norm = nn.RMSNorm(E, eps=config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(E, eps=config.rms_norm_eps) if norm else nn.Identity()

    def qkv(self, x, cos, sin):
        """x (B, T, width) -> rotated q (B, T, H, E), rotated k and v (B, T, G, E)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(torch.cat([q, k], dim=2), cos, sin).split([q.shape[2], k.shape[2]], dim=2)
        return q, k, v

    def mix(self, q, k, v, mask):
        """q (B, T, H, E); k, v (B, S, G, E); mask (B or 1, 1, T, S), None: causal -> (B, T, D)."""
        out = self.attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2],
        )  # (B, H, T, E)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x, cos, sin, mask, positions=None, cache=None, layer=0):
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, positions, k, v, mask.shape[-1])
        return self.mix(q, k, v, mask)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, *where):
        h = h + self.self_attn(self.input_layernorm(h), *where)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        register_tables(self, config)
        L = config.num_hidden_layers
        self.feature_layers = (2, L // 2, L - 3)  # EAGLE-3's choice

    def forward(self, ids, positions=None, cache=None, mask=None):
        """ids (B, T) int64 -> final hidden states (B, T, D) after the norm, features (B, T, 3D).

        positions (B, T) says where each token stands; None: they are the whole sequence.  With a
        cache a token reads all that stands before it; without one, what `mask` (B, 1, T, T), added
        to the scores, lets it read; None is causal.  Features are the hidden states that enter the
        feature layers: what an EAGLE-3 head reads."""
        h = self.model.embed_tokens(ids)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if cache is not None:
            mask = cache.mask(positions, h.dtype)
        cos, sin = rope_at(self, positions, h.dtype)
        features = []
        for i, layer in enumerate(self.model.layers):
            if i in self.feature_layers:
                features.append(h)
            h = layer(h, cos, sin, mask, positions, cache, i)
        return self.model.norm(h), torch.cat(features, dim=-1)

    def logits(self, hidden):
        """Final hidden states (..., D) -> logits (..., V), the suppressed ids at -inf."""
        return self.lm_head(hidden).index_fill_(-1, self.suppressed, float("-inf"))

    def new_cache(self, batch, length):
        weight = self.lm_head.weight
        return Cache(self.config, batch, length, weight.device, weight.dtype)


class TargetHead(nn.Module):
    """The target's frozen head alone: what a learner needs of it."""

    def __init__(self, target):
        super().__init__()
        self.register_buffer("weight", target.lm_head.weight.detach(), persistent=False)
        self.register_buffer("suppressed", target.suppressed, persistent=False)

    def forward(self, hidden):
        return F.linear(hidden, self.weight).index_fill_(-1, self.suppressed, float("-inf"))


def by_columns(model):
    """Lays float32 matrices out column after column: MKL multiplies a few rows by them faster."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()
