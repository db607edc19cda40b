"""From logits to a distribution, and from a distribution to a token.

Temperature, top-k and top-p change the distribution that a text is sampled from. Speculative
decoding applies them to target and draft alike, *before* comparing the two, and compares the very
tensors it samples from. (To sample from one q and compare with another is a common fault: the
text's law is then wrong, and the acceptance too good. transformers issue 47932.)
"""

import math

import torch
from torch import Tensor

SMALLEST = 1e-30  # floor of temperature and top_p: smaller ones are 0 in float32


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token (...): one function for all, so that ties break alike everywhere."""
    return logits.argmax(dim=-1)


def distribution(logits: Tensor, temperature=0.0, top_k=None, top_p=None) -> Tensor:
    """Logits (..., V) -> the distribution to sample from (..., V), float32.

    Used for p and q alike: it is this very tensor that is sampled from and that the rule compares.
    Temperature 0 gives a one-hot row. `top_k` keeps the k likeliest tokens (and those tied with
    the last of them), `top_p` the fewest that together reach that probability.
    """
    if temperature == 0:
        one_hot = torch.zeros(logits.shape, device=logits.device)
        return one_hot.scatter_(-1, argmax(logits)[..., None], 1.0)
    logits = logits.float()
    # The top becomes 0, so that nothing overflows; below SMALLEST, float32 would make it 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, SMALLEST)
    if top_k is not None and 0 < top_k < logits.shape[-1]:
        last_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < last_kept, -math.inf)
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= max(top_p, SMALLEST), 0.0)
        p = torch.zeros_like(p).scatter_(-1, order, ordered)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(p: Tensor, u: Tensor) -> Tensor:
    """A token (...) from p (..., V) by its cumulative sum and a uniform u (...) in [0, 1)."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    threshold = u[..., None].double() * cumulative[..., -1:]  # < the sum: never past the end
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]
