"""The small target: trained on the text by next-token cross entropy, then frozen for good.

Nothing here is KOALA's: any small language model is trained like this. Where bfloat16 is fast, its
matrices learn with Muon. In the same time Muon comes much further than AdamW (study/LOG.md).
"""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, GPTConfig
from plumbing.cli import UserError
from plumbing.files import round_weights
from plumbing.machine import bfloat16_cost, origin
from plumbing.progress import LOG_LINES, Progress, batch_indices, is_due, schedule
from targets.bpe import learn_tokenizer
from targets.features import evenly
from targets.runs import save_target
from targets.text import Text


def target_optimizers(target: GPT, name: str, learning_rate: float) -> list:
    """AdamW for all, or Muon (arXiv 2502.16982) for the layers' matrices and AdamW for the rest."""
    inside = [p for p in target.blocks.parameters() if p.dim() == 2 and name == "muon"]
    chosen = {id(p) for p in inside}
    rest = [p for p in target.parameters() if id(p) not in chosen]
    common = dict(lr=learning_rate, weight_decay=0.1)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True, **common)
    if not inside:
        return [adamw]
    # Muon's steps are scaled to the size of AdamW's, so one learning rate serves both.
    return [adamw, torch.optim.Muon(inside, adjust_lr_fn="match_rms_adamw", **common)]


@torch.no_grad()
def bits_per_byte(target: GPT, windows: Tensor, byte_counts: Tensor, autocast) -> float:
    """Cross entropy of held-out windows (N, T + 1) per byte: comparable across tokenizers."""
    nats = 0.0
    with autocast():
        for rows in windows.split(8):
            logits = target.lm_head(target(rows[:, :-1])).float()
            labels = rows[:, 1:].flatten()
            nats += F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item()
    return nats / math.log(2) / byte_counts[windows[:, 1:]].sum().item()


def train_target(path: Path, text: Text, shape: GPTConfig, seed: int, **how) -> None:
    """Learn the tokenizer and the target, and write the target to `path`.

    `shape` has the vocabulary size to learn. The vocabulary is smaller where the text has no more
    pairs to merge. `how`: the arguments of `fit_target` by name.
    """
    start, documents = time.monotonic(), text.documents["train"]
    text.use(learn_tokenizer([document.text for document in documents], shape.vocab_size))
    print(f"tokenizer: {text.encoding.n_vocab} tokens learnt in {time.monotonic() - start:.0f} s")
    torch.manual_seed(seed)
    target = GPT(replace(shape, vocab_size=text.encoding.n_vocab))
    fit_target(path, text, target, seed, **how)


def fit_target(
    path: Path,
    text: Text,
    target: GPT,
    seed: int,
    *,
    tokens: int,
    batch_tokens: int,
    learning_rate: float,
    optimizer: str,
    known_by: dict,
    autocast,
) -> None:
    """Train a target on the text, in the tokens that it uses, and write it to `path`.

    `optimizer`: auto, muon or adamw. `known_by`: the settings for the record.
    """
    device, context = autocast.device, target.config.context
    # The labels are the tokens one place later.
    windows, held_out = (text.windows(split, context + 1) for split in ("train", "valid"))
    target = target.to(device)
    per_step = max(1, batch_tokens // context)
    steps = max(1, tokens // (per_step * context))
    if optimizer == "auto":  # Muon computes in bfloat16, and is worth some time
        optimizer = "muon" if bfloat16_cost(device) < 3 else "adamw"
    optimizers = target_optimizers(target, optimizer, learning_rate)
    parts = {"target": target} | {f"optimizer_{i}": o for i, o in enumerate(optimizers)}
    in_use = {"optimizer in use": optimizer, "dtype in use": str(autocast.dtype)}
    progress = Progress(path.parent, path.stem, steps, known_by | in_use, parts)
    count = sum(p.numel() for p in target.parameters())
    work = f"{steps} steps of {per_step} x {context} tokens, {optimizer}"
    print(f"target: {count / 1e6:.1f} M parameters, {work}")
    byte_counts = text.byte_counts.to(device)
    for step in progress:
        index = batch_indices(len(windows), per_step, step, seed)
        rows = windows[index].long().to(device)  # (B, T + 1)
        with autocast():
            logits = target.lm_head(target(rows[:, :-1]))
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        target.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        for each in optimizers:
            each.param_groups[0]["lr"] = learning_rate * schedule(step, steps)
            each.step()
        evaluate = is_due(step, steps, 5)
        if evaluate or is_due(step, steps, LOG_LINES):
            values = {"loss": loss.item()}
            if evaluate:
                sample = evenly(held_out, 64).long().to(device)
                values["valid_bits_per_byte"] = bits_per_byte(target, sample, byte_counts, autocast)
            progress.log(per_step * context, **values)
    whole = held_out.long().to(device)
    data = text.description | {"overlap": text.overlap()}
    seconds = progress.elapsed()
    round_weights(target)
    bits = bits_per_byte(target, whole, byte_counts, autocast)
    if not math.isfinite(bits):
        progress.finish()  # nothing can be made of it
        raise UserError("the target diverged: try another --seed, or more --batch_tokens")
    record = {"settings": known_by, "optimizer": optimizer, "dtype": str(autocast.dtype)}
    record |= {"parameters": count, "data": data, "seconds": seconds, "valid_bits_per_byte": bits}
    record |= {"origin": origin()}
    known = f"{data['overlap']:.1%} of the test text's 32-grams occur in training"
    print(f"target: {bits:.3f} bits per byte on all of the validation text; {known}")
    save_target(path, target, text.tokenizer, record)
    progress.finish()
