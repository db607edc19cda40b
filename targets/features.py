"""The target's hidden states on a text: draft heads learn from them.

They are the same for every head and every epoch, so `Features` computes them once. `Features` here
and `Written` in written.py have one interface, the data of a head:

    len(data)              the number of windows, N
    data.windows           their tokens (N, T + 1)
    data.batch(index)      a `draft_head.Batch` of the windows with these numbers
    data.counts()          how often each token occurs among those to be learnt (V,)
"""

import time

import torch
from torch import Tensor

from draft_head import Batch
from model import GPT
from plumbing.cli import UserError
from targets.text import Text

VALID_WINDOWS = 128  # of held-out text: heads are evaluated on them
LIMIT_GB = 2.0  # of hidden states kept in memory; more are computed again for each batch


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spread over all documents; at least one."""
    count = max(1, min(count, len(rows)))
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def check_states(states: Tensor) -> None:
    """Raise UserError where states in float16 are no numbers: heads would learn nothing."""
    if not states.isfinite().all():
        raise UserError(
            "the target's hidden states hold NaN, or values beyond 65,504, the largest of float16: "
            "no head can learn from them"
        )


class Features:
    """The target's hidden states on training windows, computed once, or again for each batch."""

    def __init__(self, target: GPT, windows: Tensor, autocast, limit_gb: float = LIMIT_GB):
        """windows (N, T + 1). States (N, T, D) are kept in float16.

        The error of float16 is far below the training noise.
        """
        self.target, self.windows, self.autocast, self.kept = target, windows, autocast, None
        count, width = windows[:, :-1].numel(), target.config.width
        if count * width * 2 > limit_gb * 1e9:
            print(f"hidden states of {count:,} tokens exceed {limit_gb} GB: computed as needed")
            return
        start = time.monotonic()
        device = target.embed.weight.device
        shape = (len(windows), windows.shape[1] - 1, width)
        kept = torch.empty(shape, dtype=torch.float16, device=device)
        for i in range(0, len(windows), 8):
            kept[i : i + 8] = self.compute(windows[i : i + 8].long().to(device))
            check_states(kept[i : i + 8])
        self.kept = kept
        print(f"hidden states of {count:,} tokens computed in {time.monotonic() - start:.0f} s")

    def __len__(self) -> int:
        return len(self.windows)

    @torch.no_grad()
    def compute(self, tokens: Tensor) -> Tensor:
        """tokens (B, T + 1) -> states (B, T, D)."""
        with self.autocast():
            return self.target(tokens[:, :-1]).float()

    def batch(self, index: Tensor) -> Batch:
        """The windows with these numbers, on the target's device and in its dtype."""
        weight = self.target.embed.weight
        tokens = self.windows[index].long().to(weight.device)
        hidden = self.compute(tokens) if self.kept is None else self.kept[index]
        return Batch(tokens, hidden.to(weight.dtype), torch.ones_like(tokens, dtype=torch.bool))

    def counts(self) -> Tensor:
        """How often each token occurs among those to be learnt (V,)."""
        tokens = self.windows.flatten().long()
        return torch.bincount(tokens, minlength=self.target.config.vocab_size)


def corpus(target: GPT, text: Text, length: int, tokens: int, autocast) -> tuple:
    """Training and held-out `Features` on a text: windows of `length`, about `tokens` to learn."""
    amounts = {"train": tokens // length, "valid": VALID_WINDOWS}
    rows = [evenly(text.windows(split, length + 1), count) for split, count in amounts.items()]
    return tuple(Features(target, windows, autocast) for windows in rows)
