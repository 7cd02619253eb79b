"""One Llama-family transformer, for targets and drafts alike.

RMSNorm, rotate-half RoPE, grouped-query attention, SwiGLU; parameter names are Hugging Face's Llama
names.  Keys and values live in a cache indexed by position, one position per batch row and token, so
rolling back is nothing but going on from an earlier position: what stands there is written over.

Letters: B batch rows, T tokens of this call, S cache slots, V vocabulary, D hidden width,
         H heads, G key/value heads, E head width.
"""

import codecs
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


attend = F.scaled_dot_product_attention
SPARE = 8  # positions past the last one: a compiled forward may pad its tokens


class UserError(Exception):
    """What the user gave cannot be used.  The driver prints the message on one line and exits with code 2."""


def fast_bfloat16():
    """Does this processor multiply bfloat16?  Forwards of few rows read more than they multiply: it pays without AMX too."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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


def add_tables(model, config):
    """Buffers that follow from the configuration: RoPE tables (positions, E), norms' eps, and the ids that are never emitted."""
    cos, sin = rope_table(config, config.max_position_embeddings + SPARE)
    model.register_buffer("cos", cos, persistent=False)
    model.register_buffer("sin", sin, persistent=False)
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.register_buffer("floor", torch.tensor(norm.eps), persistent=False)
    model.register_buffer("suppressed", torch.tensor(config.suppress_tokens, dtype=torch.int64), persistent=False)


def rope_table(config, length, device=None):
    """cos and sin, each (length, E) float32, for positions 0..length-1.

    Llama 3 stretches what turns less than low_freq_factor times within the context of its first training by `factor`,
    leaves alone what turns more than high_freq_factor times, and blends the frequencies in between."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    period = config.rope_theta**exponent  # (E/2,) positions per radian
    if config.rope_scaling:
        c = config.rope_scaling
        turns = c["original_max_position_embeddings"] / (2 * torch.pi * period)
        fast = ((turns - c["low_freq_factor"]) / (c["high_freq_factor"] - c["low_freq_factor"])).clamp(0, 1)
        period = period / (fast + (1 - fast) / c["factor"])
    angles = torch.arange(length, device=device).float()[:, None] / period  # (length, E/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate-half RoPE: x (B, T, heads, E); cos, sin (B or 1, T, 1, E), in x's dtype."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-right, left], dim=-1), sin)


def rope_and_mask(model, positions, cache, dtype):
    """What attention must know of tokens at positions (B, T): cos and sin (B, T, 1, E), and the mask (B, 1, T, S) that
    is added to the scores, 0 at the slots that a token may read and -inf at those of the future.

    S: the slots in use; in a compiled forward, whose shapes are fixed, all that the cache has."""
    cos, sin = (F.embedding(positions, table)[:, :, None].to(dtype) for table in (model.cos, model.sin))
    fixed = torch.compiler.is_compiling()
    S = cache.k[0].shape[1] if fixed else int(positions.max()) + 1
    if positions.numel() == 1 and not fixed:  # a lone token reads all there is
        return cos, sin, torch.zeros(1, 1, 1, S, dtype=dtype, device=positions.device)
    slots = torch.arange(S, device=positions.device)
    mask = torch.zeros((), dtype=dtype, device=positions.device).where(slots <= positions[..., None], float("-inf"))
    return cos, sin, mask[:, None]


class Cache:
    """Keys and values, (B, S, G, E) for each layer, slot = position.  Slots past a row's position hold garbage."""

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.rows = torch.arange(batch, device=device)[:, None]


class RMSNorm(nn.RMSNorm):
    """As torch's, which is one kernel on CUDA but many operations on the CPU, where each costs a small model microseconds."""

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        square = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1])  # the mean square, and eps
        return (wide * (self.weight * square.rsqrt())).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, input_size=None):
        super().__init__()
        width, D, E = input_size or config.hidden_size, config.hidden_size, config.head_dim
        self.head_dim = E
        self.q_proj = nn.Linear(width, config.num_attention_heads * E, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * E, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * E, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(E, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(E, eps=config.rms_norm_eps)

    def qkv(self, x, cos, sin):
        """x (B, T, width) -> rotated q (B, T, H, E), rotated k and v (B, T, G, E)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(torch.cat([q, k], dim=2), cos, sin).split([q.shape[2], k.shape[2]], dim=2)
        return q, k, v

    def forward(self, x, cos, sin, mask, positions, cache, layer, last=None):
        """x (B, T, width) -> (B, T, D).  last (B,): only the output of each row's token `last` is asked for, (B, 1, D)."""
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            cache.k[layer][cache.rows, positions] = k
            cache.v[layer][cache.rows, positions] = v
            k, v = cache.k[layer][:, : mask.shape[-1]], cache.v[layer][:, : mask.shape[-1]]
        if last is not None:
            row = cache.rows[:, 0]
            q, mask = q[row, last][:, None], mask[row, :, last][:, :, None]
        out = attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2],
        )  # (B, H, T, E)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, *where):
        h = h + self.self_attn(self.input_layernorm(h), *where)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        add_tables(self, config)
        L = config.num_hidden_layers
        self.feature_layers = (2, L // 2, L - 3)  # EAGLE-3's choice; read by drafts

    def forward(self, ids, positions=None, cache=None, mask=None):
        """ids (B, T) int64 -> final hidden states (B, T, D) after the norm, features (B, T, 3D).

        With a cache, positions (B, T) says where each token stands; without one, the tokens are the whole sequence,
        or, with a mask (B, 1, T, T) that is added to the scores, whatever stands at `positions`.  Features are the
        hidden states entering `feature_layers`; where there are none, the ids themselves, (B, T, 1)."""
        h = self.model.embed_tokens(ids)
        if mask is not None:
            cos, sin = (t[positions][:, :, None].to(h.dtype) for t in (self.cos, self.sin))
        elif cache is None:
            cos, sin = (t[None, : ids.shape[1], None].to(h.dtype) for t in (self.cos, self.sin))
        else:
            cos, sin, mask = rope_and_mask(self, positions, cache, h.dtype)
        features = []
        for i, layer in enumerate(self.model.layers):
            if i in self.feature_layers:
                features.append(h)
            h = layer(h, cos, sin, mask, positions, cache, i)
        return self.model.norm(h), torch.cat(features, dim=-1) if features else ids[..., None]

    def logits(self, hidden):
        """Final hidden states (..., D) -> logits (..., V), the suppressed ids at -inf."""
        return self.lm_head(hidden).index_fill_(-1, self.suppressed, float("-inf"))

    def verify(self, ids, positions, cache):
        """A round's pass, over what was drafted -> final hidden states (B, T, D), features (B, T, 3D), logits (B, T, V)."""
        hidden, features = self(ids, positions, cache)
        return hidden, features, self.logits(hidden)

    def new_cache(self, batch, length):
        weight = self.lm_head.weight
        return Cache(self.config, batch, length, weight.device, weight.dtype)


def by_columns(model):
    """Lays its float32 matrices (out, in) out column after column, where MKL multiplies a few rows by them faster."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()


# ---- checkpoints: one file, {"config", "weights", "record"}, loaded without pickle ----------------


def save(path, config, weights, record):
    """Writes beside `path` and renames, so that what stands there is always whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": asdict(config), "weights": weights, "record": record}, f"{path}.new")
    Path(f"{path}.new").replace(path)


def load(path):
    """-> config (Config), weights (name -> tensor), record (dict of plain values)."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a file that pretrain.py or --save wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Config(**content["config"]), content["weights"], content["record"]
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{path} is not a checkpoint of this project ({type(error).__name__})") from None


def fill(model, weights, path, assign=False):
    """Copies weights into the model, or makes them its own: every tensor used, every parameter filled, every shape right."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{path}: tensor {name} is {'missing' if name in own else 'not known to this model'}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        if not all(x.isfinite() for x in tensor.aminmax()):  # NaN carries through; no copy of a large tensor is made
            raise UserError(f"{path}: {name} holds NaN or infinity")
    model.load_state_dict(weights, assign=assign)
    return model


def load_target(path):
    config, weights, record = load(path)
    if config.num_hidden_layers < 2:
        raise UserError(f"{path} is a draft, not a target: it has {config.num_hidden_layers} layer")
    return fill(Transformer(config), weights, path), record


class Bytes:
    """The embedded target needs no tokenizer: bytes after the begin token."""

    def __init__(self, config):
        if (config.vocab_size, config.bos_token_id) != (257, 256):
            raise UserError(f"this target is not byte-level: its vocabulary is {config.vocab_size} and its begin token "
                            f"{config.bos_token_id}, expected 257 and 256")

    def encode(self, text):
        return [256, *text.encode()]

    def stream(self):
        """-> put(token) -> text, and end() -> what is left of it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return (lambda token: decoder.decode(bytes([token]))), (lambda: decoder.decode(b"", final=True))
