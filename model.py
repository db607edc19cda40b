"""The target: a small decoder-only language model of the Llama type.

A language model reads tokens x_1..x_t and gives a distribution over the next one. This file holds
the network, and the cache that lets it read one more token without reading the text again. Three
things matter to the rest of the project:

- `GPT.forward` returns the hidden states h *after the final norm*, not logits. Draft heads read
  exactly this h, and `GPT.lm_head(h)` turns it into the target's logits: p = softmax(lm_head(h)).
- `KVCache` is addressed by place. Forgetting a rejected draft is moving one integer; of a draft
  that is a tree, `keep` moves the accepted path up.
- `Block` is one decoder layer. The EAGLE draft head is built from the same class.

The architecture: RMSNorm before each sublayer (arXiv 1910.07467), rotary positions (2104.09864),
grouped-query attention as an option (2305.13245), SwiGLU (2002.05202), no biases. There is no
dropout: a run of this size reads its text a few times only. Read next: draft_head.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.cli import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a target. Sizes are counts of units; nothing here depends on the data."""

    vocab_size: int = 2048
    context: int = 512  # the window: the most tokens the model can read
    num_layers: int = 16
    width: int = 256  # D
    num_heads: int = 4
    num_kv_heads: int = 4  # fewer than num_heads: grouped-query attention
    mlp_width: int = 704  # about 8/3 of the width: SwiGLU has three matrices where an MLP has two
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] = ()  # a divisor of each pair's frequency; (): all 1
    norm_eps: float = 1e-5
    tied: bool = True  # the LM head is the embedding matrix

    def __post_init__(self):
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise UserError(f"width {self.width} must be {self.num_heads} heads of an even size")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads cannot share {self.num_kv_heads} kv heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class KVCache:
    """Keys and values of the tokens read so far, one place each, in the order they were read.

    Allocated once for `max_length` tokens. `length` is how many of them count: the next write
    overwrites the places beyond, so `rollback` copies nothing and frees nothing. (Keys carry their
    rotation with them: their place does not matter, only which of them a query may see.)
    """

    def __init__(self, config: GPTConfig, num_layers: int, max_length: int, like: Tensor, batch=1):
        """`like`: any tensor of the device and dtype to use."""
        shape = (num_layers, batch, config.num_kv_heads, max_length, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.max_length = max_length
        self.length = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, Hkv, T, hd) keys and values after `length`; return all of the layer's.

        Raises ValueError where there is no room: torch would drop a single token in silence.
        """
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} tokens exceed a cache of {self.max_length}")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += count

    def rollback(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back from {self.length} tokens to {length}")
        self.length = length

    def keep(self, start: int, path: Tensor, in_place: bool) -> None:
        """Keep the places start + path, and forget all others from `start` on.

        `path` (n,) rises. `in_place`: the path is the first places anyway, and nothing has to move.
        """
        self.rollback(start + len(path))
        if not in_place:
            for stored in (self.keys, self.values):
                stored[..., start : self.length, :] = stored[..., start + path, :]


class Rotary(nn.Module):
    """Tables of the rotary embedding, and which earlier positions each position may see.

    Positions enter a query and a key by rotating each pair of their coordinates by an angle that
    is proportional to the position, so that their product depends on the distance alone.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
        frequency = config.rope_theta**-pairs / torch.tensor(config.rope_factors or 1.0)
        angle = torch.outer(torch.arange(config.context), frequency)  # (C, hd/2)
        cos, sin = angle.cos(), angle.sin()
        # Coordinate i is paired with i + hd/2: the rotated vector is x * cos + swap(x) * sin.
        self.register_buffer("cos", torch.cat([cos, cos], -1), persistent=False)  # (C, hd)
        self.register_buffer("sin", torch.cat([-sin, sin], -1), persistent=False)
        # Added to the scores: 0 for a key that may be seen, -inf for one that may not. Every row of
        # the causal mask is a part of this one: a square of it would take 64 GiB at C = 131,072.
        row = torch.zeros(2 * config.context)
        row[config.context :] = -math.inf
        self.register_buffer("causal", row, persistent=False)  # (2 C,)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """For positions start..start+length-1: cos and sin (T, hd), mask (T, start+T).

        The mask is None where the attention can do without: one query sees every key, and a text
        read from its beginning is causal, which the attention kernel has a faster path for.
        """
        end = start + length
        mask = None
        if start > 0 and length > 1:
            # From C - t - 1 on the row has t + 1 zeros: the keys that position t may see.
            first = len(self.causal) // 2 - end
            mask = self.causal.unfold(0, end, 1)[first : first + length].flip(0)
        return self.cos[start:end], self.sin[start:end], mask

    def tree(self, start: int, positions, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for nodes of a tree: `positions` (T,), or one slice for all of them.

        `seen` (T, M) bool: which of the last M keys each node may see; all see the `start` before.
        """
        unseen = torch.zeros_like(seen, dtype=self.causal.dtype).masked_fill_(~seen, -math.inf)
        before = self.causal[:start].expand(len(seen), start)
        return self.cos[positions], self.sin[positions], torch.cat([before, unseen], 1)


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, width = config.head_dim, config.width
        # One matrix for queries, keys and values, one for gate and up: fewer, larger products.
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, rows, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.mlp_out = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, rotary, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x (B, T, D) -> (B, T, D). `rotary`: what `Rotary` gave for these T positions.

        With a cache the T tokens follow the ones in it, and their keys and values are written to
        its `layer`; the caller advances the cache once all layers have written.
        """
        batch, length, _ = x.shape
        cos, sin, mask = rotary
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.head_dim)
        qkv = qkv.transpose(1, 2)  # (B, H + 2 Hkv, T, hd)
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)  # (B, H or Hkv, T, hd)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, Hkv, length + T, hd)
        shared = self.num_heads // self.num_kv_heads
        if shared > 1 and (length == 1 or mask is not None):
            # The queries that share keys see the same ones. As one text of queries they spare the
            # kernel a copy of the keys for each (half the time of a step of 96 texts).
            q = q.reshape(batch, self.num_kv_heads, shared * length, self.head_dim)
            mask = mask.repeat(shared, 1) if mask is not None else None  # (H / Hkv * T, ..)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        attended = attended.reshape(batch, self.num_heads, length, -1).transpose(1, 2)
        x = x + self.attention_out(attended.reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # (B, T, mlp_width) each
        return x + self.mlp_out(F.silu(gate) * up)


class GPT(nn.Module):
    """The target. `forward` gives hidden states; `lm_head` turns them into logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Maps back into the residual stream are smaller, so that the stream's variance
                # does not grow with depth (GPT-2, section 2.3).
                scale = (2 * config.num_layers) ** -0.5 if name.endswith("_out.weight") else 1.0
                nn.init.normal_(weight, std=0.02 * scale)
        if config.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor, cache: KVCache | None = None, positions=None, mask=None):
        """tokens (B, T) -> hidden states h after the final norm (B, T, D).

        With a cache the tokens continue what it holds, and it advances by T. The nodes of a tree
        come with their `positions` (T,) and a `mask` (T, T) bool: node i sees node j.
        Raises ValueError beyond the context window (for a tree IndexError).
        """
        start = cache.length if cache is not None else 0
        if mask is not None:
            rotary = self.rotary.tree(start, positions, mask)
        elif start + tokens.shape[1] > self.config.context:
            raise ValueError(f"{start + tokens.shape[1]} tokens exceed {self.config.context}")
        else:
            rotary = self.rotary(start, tokens.shape[1])
        states = self.read(tokens, cache, rotary)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return states

    def read(self, tokens: Tensor, cache: KVCache | None, rotary) -> Tensor:
        """`forward` with what `Rotary` gave for these positions; the cache does not advance."""
        x = self.embed(tokens)  # (B, T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer)
        return self.norm(x)

    def new_cache(self, max_length: int | None = None, batch: int = 1) -> KVCache:
        """An empty cache for this model, of the whole window unless told otherwise."""
        length = max_length or self.config.context
        return KVCache(self.config, self.config.num_layers, length, self.embed.weight, batch)
