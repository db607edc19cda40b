"""Training: first the target, then draft heads that learn to guess what it will say.

**Target.** Next-token cross entropy on the training text; then frozen for good. Its hidden states
on part of the text are computed once, and every draft head learns from the same ones.

**Head, supervised.** L_sup: see `supervised_loss` of each kind in draft_head.py.

**Head and discriminator, joint** (KOALA, arXiv 2408.08146). After the supervised part of the steps,
since an adversarial term added before the plateau only slows the head, and some hundred steps of
D alone on the head as it stands, the two alternate on each batch:

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

lambda = 0 is the original head: same batches, same number of head steps, and no D. The checkpoint
kept is the one that would accept most of its drafts on validation text, not that of lowest loss.

`python train.py` trains the target and four heads: {medusa, eagle} x {original: K = 1, lambda = 0;
KOALA: K = 2, lambda > 0}. It can be interrupted at any time: the same command goes on where it
stopped. Read next: speculate.py.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from cli import (
    UserError,
    bfloat16_cost,
    choose_device,
    compile_layers,
    describe_device,
    parse,
    run,
)
from discriminator import Discriminator, adversarial_loss, discriminator_loss, exact_logits, health
from draft_head import HeadConfig, build_head, save_head, trained_heads
from features import Features, Text, bits_per_byte, measure_acceptance, spread
from model import GPT, load_checkpoint, load_target, save_target
from recipe import (
    HEADS,
    PRESETS,
    TrainConfig,
    head_settings,
    target_settings,
    text_packages,
)
from report import heads_table, plot_training
from stage import Stage, batch_indices, check_same, is_due, keep_freed_memory, schedule

LOG_LINES = 30  # of each stage
EVALUATIONS = 10  # of each head on validation text
VALID_WINDOWS = 128  # that they are measured on

# ------------------------------------------------------------------------------------ target


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
    per_step = config.windows_per_step
    steps = max(1, config.target_tokens // (per_step * config.context))
    optimizer_name = config.optimizer
    if optimizer_name == "auto":  # Muon computes in bfloat16, and is worth some time
        optimizer_name = "muon" if bfloat16_cost(device) < 3 else "adamw"
    optimizers = target_optimizers(config, target, optimizer_name)
    parts = {"target": target} | {f"optimizer_{i}": o for i, o in enumerate(optimizers)}
    wanted = target_settings(config, text)
    in_progress = wanted | {"optimizer in use": optimizer_name}
    stage = Stage(config.folder, "target", steps, in_progress, parts)
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


# ------------------------------------------------------------------------------------- heads


class Game:
    """The losses of a head on one batch, and the discriminator's side of them."""

    def __init__(self, target: GPT, head, discriminator: Discriminator | None):
        """`discriminator=None`: where an adversary is called for, the closed form p / (p + q)."""
        self.target, self.head, self.discriminator = target, head, discriminator

    def guess(self, tokens: Tensor, hidden: Tensor):
        """The head's guess, and the target's p (B, T, V)."""
        with torch.no_grad():
            p = self.target.lm_head(hidden).float().softmax(-1)
        return self.head(tokens, hidden), p

    def judged(self, guess, hidden: Tensor, p: Tensor):
        """For each draft position: its weight, D's logits, p and q, each (B, T - i, V).

        The head guessed from the state `i` places before the one that p comes from.
        """
        for i, logits in enumerate(guess.logits, start=1):
            q = logits.float().softmax(-1)
            if self.discriminator is None:
                d_logits = exact_logits(p[:, i:], q)
            else:
                d_logits = self.discriminator(hidden[:, :-i], hidden[:, i:], i - 1).float()
            yield self.head.position_weights[i - 1], d_logits, p[:, i:], q

    def head_losses(self, guess, tokens: Tensor, hidden: Tensor, p: Tensor, adversarial: bool):
        """(L_sup, L_adv); L_G = L_sup + lambda L_adv. L_adv is None where it is not played."""
        supervised = self.head.supervised_loss(guess, tokens, hidden, p)
        if not adversarial:
            return supervised, None
        judged = self.judged(guess, hidden, p)
        return supervised, sum(w * adversarial_loss(d, q) for w, d, _, q in judged)

    def discriminator_loss(self, guess, hidden: Tensor, p: Tensor) -> Tensor:
        return sum(
            w * discriminator_loss(d, p_i, q) for w, d, p_i, q in self.judged(guess, hidden, p)
        )

    @torch.no_grad()
    def health(self, guess, hidden: Tensor, p: Tensor) -> dict[str, float]:
        """D's figures, the mean over draft positions."""
        each = [health(d, p_i, q) for _, d, p_i, q in self.judged(guess, hidden, p)]
        return {key: sum(one[key] for one in each) / len(each) for key in each[0]}


def gradient_ratio(head, supervised: Tensor, adversarial: Tensor, weight: float) -> float:
    """||lambda grad L_adv|| / ||grad L_sup|| over the head's parameters; keeps both graphs."""
    parameters = [p for p in head.parameters() if p.requires_grad]

    def norm(loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))

    return weight * norm(adversarial) / max(norm(supervised), 1e-12)


def train_head(
    config: TrainConfig, name: str, target, target_print, train, valid, autocast
) -> dict:
    """Train one head on `train`, select it on `valid` (both Features), write NAME.pt."""
    layers, weight = config.layers_and_weight(name)
    torch.manual_seed(config.seed)
    head = build_head(HeadConfig(name.split("-")[0], layers), target)
    discriminator = None
    if weight > 0 and config.discriminator == "learnt":
        positions = len(head.position_weights)
        discriminator = Discriminator(target.lm_head.weight, positions)
        discriminator.to(target.embed.weight.device)
    game = Game(target, head, discriminator)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.head_lr, betas=(0.9, 0.95), fused=True
    )
    parts = {"head": head, "optimizer": optimizer}
    if discriminator is not None:
        d_optimizer = torch.optim.Adam(
            discriminator.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.9)
        )
        parts |= {"discriminator": discriminator, "d_optimizer": d_optimizer}
    per_step = config.windows_per_step
    steps = max(1, config.head_tokens // (per_step * config.context))
    joint_from = int(config.supervised_share * steps) if weight > 0 else steps
    wanted = head_settings(config, name, target_print)
    stage = Stage(config.folder, name, steps, wanted, parts)
    if stage.step == 0:
        head.prepare(*train.batch(spread(torch.arange(len(train.windows)), 32)))
    head.train()

    def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed * 7919 + step)  # the noise on EAGLE's input: of this step's own
        return train.batch(batch_indices(len(train.windows), per_step, step, seed))

    def discriminator_step(hidden: Tensor, guess, p: Tensor) -> None:
        with autocast():
            loss = game.discriminator_loss(guess, hidden, p)
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()

    def detached(guess):
        return guess._replace(logits=[logits.detach() for logits in guess.logits])

    for step in stage:
        if step == joint_from and discriminator is not None:
            print(f"{name}: {config.discriminator_steps} steps of the discriminator alone")
            for d_step in range(config.discriminator_steps):
                tokens, hidden = batch(d_step, config.seed + 2)
                with torch.no_grad(), autocast():
                    guess, p = game.guess(tokens, hidden)
                discriminator_step(hidden, guess, p)
        tokens, hidden = batch(step, config.seed)
        with autocast():
            guess, p = game.guess(tokens, hidden)
        joint = step >= joint_from
        if joint and discriminator is not None:
            discriminator_step(hidden, detached(guess), p)
        with autocast():
            supervised, adversarial = game.head_losses(guess, tokens, hidden, p, joint)
        values = {"loss_sup": supervised.item()} if (log := is_due(step, steps, LOG_LINES)) else {}
        if log and joint:
            ratio = gradient_ratio(head, supervised, adversarial, weight)
            values |= {"loss_adv": adversarial.item(), "gradient_ratio": ratio}
            values |= game.health(detached(guess), hidden, p)
        loss = supervised + weight * adversarial if joint else supervised
        optimizer.param_groups[0]["lr"] = config.head_lr * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if is_due(step, steps, EVALUATIONS):
            head.eval()
            values |= measure_acceptance(target, head, valid, count=64)
            head.train()
            stage.keep_if_best(values["tau_estimate"], head)
        if log or "tau_estimate" in values:
            stage.log(per_step * config.context, **values)
    if stage.best is None:
        raise UserError(f"{name} diverged: try a lower --head_lr or --adversarial_weight")
    head.load_state_dict(stage.best)
    head.eval()
    record = {
        "name": name,
        "settings": wanted,
        "kept_step": stage.best_step,
        "steps": steps,
        "seconds": stage.elapsed(),
        "parameters": sum(p.numel() for p in head.parameters()),
        "valid": measure_acceptance(target, head, valid, len(valid.windows), by_rank=True),
        "log": [row for row in stage.rows if "tau_estimate" in row],
    }
    save_head(config.folder / f"{name}.pt", head, target_print, record)
    stage.finish()
    return record


# --------------------------------------------------------------------------------------- main


def train_heads(config: TrainConfig, text: Text, device, autocast) -> None:
    """Train the heads that are still missing, then write the table and the plot."""
    folder = config.folder
    target, checkpoint = load_target(folder / "target.pt", device)
    target_print = checkpoint["fingerprint"]
    train = valid = None
    for name in [config.head] if config.head else HEADS:
        path = folder / f"{name}.pt"
        if path.is_file():
            record = load_checkpoint(path, "draft head")["training"]
            check_same(path, record["settings"], head_settings(config, name, target_print))
            print(f"{name}: trained already")
            continue
        if train is None:
            rows = text.windows("train", config.context + 1)
            rows = spread(rows, config.head_data_tokens // config.context)
            train = Features(target, rows, config.cache_gb, autocast)
            rows = spread(text.windows("valid", config.context + 1), VALID_WINDOWS)
            valid = Features(target, rows, config.cache_gb, autocast)
        train_head(config, name, target, target_print, train, valid, autocast)
    found = [load_checkpoint(folder / f"{name}.pt", "draft head") for name in trained_heads(folder)]
    records = [head["training"] for head in found if head["target"] == target_print]
    (folder / "heads.md").write_text(heads_table(records) + "\n")
    plot_training(folder, [record["name"] for record in records])
    print(f"\nOn validation text, drafting along the text itself:\n\n{heads_table(records)}\n")
    print(f"written: {folder / 'heads.md'}, {folder / 'training.png'}")


def main() -> None:
    config = parse(TrainConfig, presets=PRESETS)
    device = choose_device(config.device)
    fast = bfloat16_cost(device) < 0.7
    low = config.dtype == "bfloat16" or config.dtype == "auto" and fast
    reason = "bfloat16 is " + ("faster here" if fast else "not faster here")
    print(f"{describe_device(device)}, {'bfloat16 autocast' if low else 'float32'} ({reason})")
    keep_freed_memory()

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()

    text = Text(config.data, text_packages(asdict(config)), ("train", "valid"))
    config.folder.mkdir(parents=True, exist_ok=True)
    target_path = config.folder / "target.pt"
    about = text.description
    print(
        f"text: {about['source']} (Python {about['python']}), split {about['hash']}, bytes", end=" "
    )
    print(", ".join(f"{split} {size:,}" for split, size in about["bytes"].items()))
    print(f"run: {config.folder}")
    if target_path.is_file():
        checkpoint = load_checkpoint(target_path, "target")
        check_same(target_path, checkpoint["training"]["settings"], target_settings(config, text))
        text.use(checkpoint["tokenizer"])
        print("target: trained already")
    elif config.stage == "heads":
        raise UserError(f"there is no target at {target_path}: train it with --stage target")
    elif config.tokenizer != "bpe":
        text.use({"name": config.tokenizer})
    else:
        start = time.monotonic()
        documents = text.documents["train"]
        text.use(data.learn_tokenizer([d.text for d in documents], config.vocab_size))
        print(
            f"tokenizer: {text.encoding.n_vocab} tokens learnt in {time.monotonic() - start:.0f} s"
        )
    if not target_path.is_file():
        train_target(config, text, device, autocast)
    if config.stage != "target":
        train_heads(config, text, device, autocast)


if __name__ == "__main__":
    run(main)
