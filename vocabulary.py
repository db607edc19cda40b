"""The draft vocabulary: a head that knows the most frequent tokens only (FR-Spec, 2502.14856).

Beside a large vocabulary the map from a hidden state to logits is what drafting costs most: for
SmolLM2 28 M weights are to be read, where a decoder layer has 3.5 M. But most of a text is made of
few tokens. A head that knows the S most frequent ones has logits (.., S), and q is 0 for all
others. The rules of speculate.py need no exception for that: the text is still exactly the
target's. The price is that the other tokens are never guessed: see `coverage`.
"""

import torch
from torch import Tensor, nn

from model import GPT


class Vocabulary(nn.Module):
    """The tokens that a head can guess. Its logits are numbered by their places in here."""

    def __init__(self, size: int, target: GPT):
        """`size` tokens, which ones is set by `choose` or comes with the weights; 0: all."""
        super().__init__()
        self.whole = target.config.vocab_size
        self.register_buffer("tokens", torch.arange(size) if size else None)  # (S,)

    def choose(self, counts: Tensor) -> None:
        """Take those that are most frequent by `counts` (V,)."""
        if self.tokens is not None:
            order = counts.argsort(descending=True, stable=True)[: len(self.tokens)]
            self.tokens.copy_(order.sort().values)

    def coverage(self, counts: Tensor) -> float:
        """The share of a text, whose tokens have these counts (V,), that a head can guess."""
        return (self.rows(counts).sum() / counts.sum()).item()

    def rows(self, weight: Tensor) -> Tensor:
        """Of an LM head (V, D) the rows that are of use (S, D)."""
        return weight if self.tokens is None else weight[self.tokens]

    def names(self, places: Tensor) -> Tensor:
        """Places among the logits -> tokens."""
        return places if self.tokens is None else self.tokens[places]

    def places(self, tokens: Tensor) -> Tensor:
        """Tokens -> their places; -1 for one that is not in here."""
        if self.tokens is None:
            return tokens
        places = self.tokens.new_full((self.whole,), -1)
        places[self.tokens] = torch.arange(len(self.tokens), device=places.device)
        return places[tokens]

    def spread(self, q: Tensor) -> Tensor:
        """q (k, S) -> q (k, V), 0 for a token that is not in here."""
        if self.tokens is None:
            return q
        return q.new_zeros(len(q), self.whole).index_copy_(1, self.tokens, q)
