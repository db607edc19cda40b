"""What is measured and learnt from: windows of text, and the target's hidden states on them.

A draft head learns from the target's hidden states h. They are the same for every head and every
epoch, so `Features` computes them once. On held-out text they also tell how well a head drafts,
without decoding anything: `measure_acceptance`.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from cli import UserError
from discriminator import acceptance
from draft_head import Batch
from model import GPT
from sampling import argmax

DRAFT_POSITIONS = 4  # how far into a draft the held-out acceptance is measured
RANKS = 16  # how many of a head's guesses at each position are counted
HEATS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)  # temperatures that q is also tried at


class Text:
    """The text of a run in tokens: `splits` of them, cut into windows on demand."""

    def __init__(self, paths: list[str] | None, packages: tuple[str, ...], splits: tuple[str, ...]):
        self.documents = data.load_documents(paths, packages)
        self.description = data.describe(self.documents, paths, packages)
        self.splits = splits

    def use(self, tokenizer: dict) -> None:
        """Tokenize with `tokenizer`, as `data.learn_tokenizer` gave it or a checkpoint kept it."""
        self.tokenizer, self.encoding = tokenizer, data.build_encoding(tokenizer)
        self.tokens = {s: data.tokenize(self.encoding, self.documents[s]) for s in self.splits}
        self.byte_counts = data.token_bytes(self.encoding)

    def windows(self, split: str, length: int) -> Tensor:
        """(N, length) consecutive windows of a split. Raises UserError if there is not one."""
        rows = data.windows(self.tokens[split], length)
        if len(rows) == 0:
            raise UserError(
                f"the {split} text has {len(self.tokens[split])} tokens, less than one window of "
                f"{length}: give more text, or a smaller --context"
            )
        return rows

    def overlap(self) -> float:
        """The share of the test text's 32-grams that occur in training: near-copies flatter."""
        test = data.tokenize(self.encoding, self.documents["test"])
        return data.overlap(self.tokens["train"], test)


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly spread over all documents; at least one."""
    count = max(1, min(count, len(rows)))
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


@torch.no_grad()
def bits_per_byte(target: GPT, windows: Tensor, byte_counts: Tensor, autocast) -> float:
    """Cross entropy of held-out windows (N, T + 1) per byte of text: comparable across tokenizers."""
    nats = 0.0
    with autocast():
        for rows in windows.split(8):
            logits = target.lm_head(target(rows[:, :-1])).float()
            labels = rows[:, 1:].flatten()
            nats += F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item()
    return nats / math.log(2) / byte_counts[windows[:, 1:]].sum().item()


class Features:
    """The target's hidden states on training windows, computed once, or again for each batch."""

    def __init__(self, target: GPT, windows: Tensor, limit_gb: float, autocast):
        """windows (N, T + 1). Kept as float16, whose error is far below the training noise."""
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
        self.kept = kept
        print(f"hidden states of {count:,} tokens computed in {time.monotonic() - start:.0f} s")

    @torch.no_grad()
    def compute(self, tokens: Tensor) -> Tensor:
        with self.autocast():
            return self.target(tokens[:, :-1]).float()

    def batch(self, index: Tensor) -> Batch:
        """The windows of these numbers, on the target's device and of its dtype."""
        weight = self.target.embed.weight
        tokens = self.windows[index].long().to(weight.device)
        hidden = self.compute(tokens) if self.kept is None else self.kept[index]
        return Batch(tokens, hidden.to(weight.dtype), torch.ones_like(tokens, dtype=torch.bool))

    def counts(self) -> Tensor:
        """How often each token is to be learnt (V,)."""
        tokens = self.windows.flatten().long()
        return torch.bincount(tokens, minlength=self.target.config.vocab_size)


@torch.no_grad()
def measure_acceptance(
    target: GPT, head, features: Features, count: int, stride: int = 16, by_rank=False
) -> dict:
    """How a head drafts on given text: per draft position i, with the text itself as the path.

    agree_i: share of positions where head and target have the same first choice; alpha_i: mean of
    sum_x min(p, q). tau_estimate = 1 + sum_i prod_{j <= i} agree_j, the greedy acceptance length
    if positions were independent. `by_rank` adds what trees are chosen by, two lists (P, RANKS):
    `ranks`, how often the head's r-th guess is the target's first choice, and `mass`, the mean p of
    that guess; and `heated` (HEATS, P), alpha with q's logits divided by each of HEATS.
    Uses the decoder's own `absorb` and `expand`, many rows at once.
    """
    batch = features.batch(spread(torch.arange(len(features.windows)), count))
    tokens, hidden, learn = batch
    positions = min(DRAFT_POSITIONS, head.max_draft or DRAFT_POSITIONS)
    length, drafts, alpha = hidden.shape[1], 0, torch.zeros(positions, dtype=torch.float64)
    ranks = torch.zeros(positions, min(RANKS, target.config.vocab_size), dtype=torch.float64)
    mass = torch.zeros_like(ranks)
    heated = torch.zeros(len(HEATS) if by_rank else 0, positions, dtype=torch.float64)
    state, read = head.start(length + positions, batch=len(tokens)), 0
    starts = range(min(stride, length - positions), length - positions + 1, stride)
    for start in starts:
        head.absorb(state, tokens[:, read + 1 : start + 1], hidden[:, read:start])
        read = start
        use = learn[:, start + 1 : start + positions + 1].all(1)  # (B,): all of it to be learnt
        drafts += use.sum().item()
        for i, here in enumerate(range(start, start + positions)):
            # The text itself is the path.
            logits = head.expand(state, tokens[:, here, None]) if i else head.expand(state)
            p = target.lm_head(hidden[use, here]).float().softmax(-1)  # (B', V)
            logits = logits[use, 0].float()  # (B', S)
            q, p_known = logits.softmax(-1), head.vocabulary.rows(p.T).T
            guesses = head.vocabulary.names(q.topk(ranks.shape[1]).indices)  # (B', RANKS)
            ranks[i] += (guesses == argmax(p)[:, None]).sum(0).cpu()
            mass[i] += p.gather(-1, guesses).sum(0).cpu()
            alpha[i] += acceptance(p_known, q).sum().item()
            for row, heat in zip(heated, HEATS):  # none unless `by_rank`
                row[i] += acceptance(p_known, (logits / heat).softmax(-1)).sum().item()
    if drafts == 0:
        raise UserError("the held-out text has nothing to learn in it: write or give more")
    ranks, mass, alpha = ranks / drafts, mass / drafts, alpha / drafts
    agree = ranks[:, 0]
    result = {f"agree_{i + 1}": value.item() for i, value in enumerate(agree)}
    result |= {f"alpha_{i + 1}": value.item() for i, value in enumerate(alpha)}
    # Of a head that diverged the first choice is some token all the same: alpha alone tells.
    diverged = alpha.isnan().any()
    result["tau_estimate"] = math.nan if diverged else 1 + agree.cumprod(0).sum().item()
    lists = {"ranks": ranks, "mass": mass, "heated": heated / drafts}
    return result | ({key: rows.tolist() for key, rows in lists.items()} if by_rank else {})
