"""Training of a target: next-token cross entropy on the training text, then it is frozen for good.

Nothing of KOALA is in here: this is how any small language model is trained. Its matrices learn
with Muon where bfloat16 is fast, which in the same time comes much further than AdamW (LOG.md).
Read next: draft_head.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cli import bfloat16_cost, compile_layers
from features import Text, bits_per_byte, spread
from model import GPT, save_target
from recipe import TrainConfig, target_settings
from stage import LOG_LINES, Stage, batch_indices, is_due, schedule


def target_optimizers(config: TrainConfig, target: GPT, name: str) -> list:
    """AdamW for all, or Muon (arXiv 2502.16982) for the layers' matrices and AdamW for the rest."""
    inside = [p for p in target.blocks.parameters() if p.dim() == 2 and name == "muon"]
    chosen = {id(p) for p in inside}
    rest = [p for p in target.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        rest, lr=config.target_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    if not inside:
        return [adamw]
    # Its steps are scaled to the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(
        inside, lr=config.target_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def train_target(config: TrainConfig, text: Text, device, autocast) -> None:
    """Train the target on next-token cross entropy and write target.pt."""
    length = config.context + 1  # the labels are the tokens one further on
    windows, held_out = text.windows("train", length), text.windows("valid", length)
    torch.manual_seed(config.seed)
    target = GPT(config.gpt(text.encoding.n_vocab)).to(device)
    per_step = max(1, config.batch_tokens // config.context)
    steps = max(1, config.target_tokens // (per_step * config.context))
    optimizer_name = config.optimizer
    if optimizer_name == "auto":  # Muon computes in bfloat16, and is worth some time
        optimizer_name = "muon" if bfloat16_cost(device) < 3 else "adamw"
    optimizers = target_optimizers(config, target, optimizer_name)
    parts = {"target": target} | {f"optimizer_{i}": o for i, o in enumerate(optimizers)}
    wanted = target_settings(config, text)
    in_use = {"optimizer in use": optimizer_name, "dtype in use": str(autocast.dtype)}
    stage = Stage(config.folder, "target", steps, wanted | in_use, parts)
    count = sum(p.numel() for p in target.parameters())
    print(
        f"target: {count / 1e6:.1f} M parameters, {steps} steps of {per_step} x {config.context} "
        f"tokens, {optimizer_name}"
    )
    if config.compile:
        compile_layers(target)
    byte_counts = text.byte_counts.to(device)
    for step in stage:
        index = batch_indices(len(windows), per_step, step, config.seed)
        rows = windows[index].long().to(device)  # (B, T + 1)
        with autocast():
            logits = target.lm_head(target(rows[:, :-1]))
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        target.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = config.target_lr * schedule(step, steps)
            optimizer.step()
        evaluate = is_due(step, steps, 5)
        if evaluate or is_due(step, steps, LOG_LINES):
            values = {"loss": loss.item()}
            if evaluate:
                sample = spread(held_out, 64).long().to(device)
                values["valid_bits_per_byte"] = bits_per_byte(target, sample, byte_counts, autocast)
            stage.log(per_step * config.context, **values)
    whole = held_out.long().to(device)
    record = {
        "settings": wanted,
        "optimizer": optimizer_name,
        "dtype": str(autocast.dtype),
        "parameters": count,
        "data": text.description | {"overlap": text.overlap()},
        "seconds": stage.elapsed(),
        "valid_bits_per_byte": bits_per_byte(target, whole, byte_counts, autocast),
    }
    print(
        f"target: {record['valid_bits_per_byte']:.3f} bits per byte on all of the validation text; "
        f"{record['data']['overlap']:.1%} of the test text's 32-grams occur in training"
    )
    save_target(config.folder / "target.pt", target, text.tokenizer, record)
    stage.finish()
