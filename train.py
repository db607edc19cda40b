"""Training: first the target, then draft heads that learn to guess what it will say.

**Target.** Trained on the text (train_target.py) or pretrained elsewhere (pretrained.py); then
frozen for good. Heads learn from its hidden states, computed once: on the text, or on what the
target itself has written (selfwritten.py).

**Head, supervised.** L_sup: see `supervised_loss` of each kind in draft_head.py.

**Head and discriminator, joint** (KOALA, arXiv 2408.08146). After the supervised part of the steps,
since an adversarial term added before the plateau only slows the head, and some hundred steps of
D alone on the head as it stands, the two alternate on each batch:

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

lambda = 0 is the original head: same batches, same number of head steps, and no D. The checkpoint
kept is the one that would accept most of its drafts on held-out text, not that of lowest loss.

`python train.py` trains the target and four heads: {medusa, eagle} x {original: K = 1, lambda = 0;
KOALA: K = 2, lambda > 0}. It can be interrupted at any time: the same command goes on where it
stopped. Read next: speculate.py.
"""

import copy
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import data
from budget import Budget, Seconds, step_seconds
from chat import Chat
from cli import UserError, bfloat16_cost, choose_device, describe_device, parse, run
from draft_head import Batch
from features import Features, Text, measure_acceptance, spread
from head_training import HeadTraining
from model import load_checkpoint, load_target
from pretrained import find_source, import_target, source_settings
from recipe import (
    HEADS,
    PRESETS,
    PRETRAINED,
    TrainConfig,
    head_settings,
    target_settings,
    text_packages,
)
from report import heads_table, plot_training
from runs import save_head, trained_heads
from selfwritten import CHATS, OPENING, TEXTS, Conversations, Written, write_until
from stage import (
    LOG_LINES,
    Autocast,
    Stage,
    batch_indices,
    check_same,
    hand_back_gaps,
    is_due,
    keep_freed_memory,
    schedule,
)
from train_target import train_target

EVALUATIONS = 10  # of each head on held-out text
VALID_WINDOWS = 128  # that they are measured on


def train_head(
    config: TrainConfig, name: str, target, wanted: dict, train, valid, autocast, before=None
) -> dict:
    """Train one head on `train`, select it on `valid`, write NAME.pt; return the record in it.

    `wanted`: the settings it is known by. `before`: the checkpoint to go on from, with --more.
    """
    training = HeadTraining(config, name, target, autocast)
    head, per_step = training.head, config.head_windows_per_step
    steps = max(1, wanted["head_tokens"] // config.head_tokens_per_step)
    joint_from = int(config.supervised_share * steps) if training.weight > 0 else steps
    in_progress = wanted | {"dtype in use": str(autocast.dtype)}
    earlier = before["training"]["log"] if before else []
    stage = Stage(config.folder, name, steps, in_progress, training.parts(), earlier)

    def measure() -> dict:
        head.eval()
        values = measure_acceptance(target, head, valid, count=64)
        head.train()
        return values

    if stage.step > 0:
        training.ready()
    elif before is not None:
        head.load_state_dict(before["weights"])
        training.ready()
        stage.keep_if_best(measure()["tau_estimate"], head, step=0)
    else:
        training.start(train)
    coverage = head.vocabulary.coverage(valid.counts().to(target.embed.weight.device))
    if config.head_vocab(target):
        print(f"{name}: guesses {config.draft_vocab} tokens, {coverage:.2%} of held-out text")
    seed = config.seed + 97 * wanted.get("round", 0)  # a further round sees the text in a new order

    def batch(step: int, seed: int) -> Batch:
        torch.manual_seed(seed * 7919 + step)  # the noise on EAGLE's input: of this step's own
        return training.lesson(train.batch(batch_indices(len(train.windows), per_step, step, seed)))

    for step in stage:
        if step == joint_from and training.discriminator is not None:
            print(f"{name}: {config.discriminator_steps} steps of the discriminator alone")
            stage.save()
            for d_step in range(config.discriminator_steps):
                training.discriminator_alone(batch(d_step, seed + 2))
                stage.heed()
        log = is_due(step, steps, LOG_LINES)
        own = config.own_steps if step >= int(config.own_from * steps) else 1
        rate = schedule(step, steps)
        values = training.step(batch(step, seed), step >= joint_from, own, rate, log)
        if is_due(step, steps, EVALUATIONS):
            values |= measure()
            stage.keep_if_best(values["tau_estimate"], head)
        if log or "tau_estimate" in values:
            stage.log(config.head_tokens_per_step, **values)
            hand_back_gaps()
    if stage.best is None:
        raise UserError(f"{name} diverged: try a lower --head_lr or --adversarial_weight")
    head.load_state_dict(stage.best)
    head.eval()
    rounds = before["training"]["rounds"] if before else []
    tokens = steps * config.head_tokens_per_step
    record = {
        "name": name,
        "settings": wanted,
        "dtype": str(autocast.dtype),
        "kept_step": stage.best_step,  # of this round; 0: the head as it was before
        "steps": steps,
        "seconds": stage.elapsed() + sum(r["seconds"] for r in rounds),
        "parameters": sum(p.numel() for p in head.parameters()),
        "coverage": coverage,  # share of held-out text whose tokens it can guess
        "valid": measure_acceptance(target, head, valid, len(valid.windows), by_rank=True),
        "log": [row for row in stage.rows if "tau_estimate" in row],
    }
    about = {"tokens": tokens, "windows": len(train.windows), "seconds": stage.elapsed()}
    record["rounds"] = [*rounds, about | {"tau_estimate": record["valid"]["tau_estimate"]}]
    save_head(config.folder / f"{name}.pt", head, wanted["target"], record)
    stage.finish()
    return record


# --------------------------------------------------------------------------------------- main


def corpus(config: TrainConfig, target, text: Text, autocast) -> tuple[Features, Features]:
    """What heads learn from and are held to: the text, with the target's states on it."""
    length = config.head_window + 1
    rows = spread(text.windows("train", length), config.head_data_tokens // config.head_window)
    train = Features(target, rows, config.cache_gb, autocast)
    rows = spread(text.windows("valid", length), VALID_WINDOWS)
    return train, Features(target, rows, config.cache_gb, autocast)


def self_written(config: TrainConfig, target, checkpoint: dict, text, budget: Budget, autocast):
    """What heads learn from and are held to: what the target writes, by now or from now on."""
    encoding = data.build_encoding(checkpoint["tokenizer"])
    chat = Chat.of(encoding, checkpoint["tokenizer"])
    about = {
        "target": checkpoint["fingerprint"],
        "length": config.head_window,
        "width": target.config.width,
        "seed": config.seed,
        "dtype": str(autocast.dtype),
        "rules": TEXTS if chat is None else CHATS,
    }
    written = Conversations(config.folder / "conversations", about)
    openings = None
    if chat is None:
        if text is None:  # of a pretrained target that knows no chats, which is known only now
            text = read_text(config)
            text.use(checkpoint["tokenizer"])
        begin = torch.tensor(encoding.begin, dtype=torch.long)
        size = min(OPENING, config.head_window // 2) - len(begin)
        openings = text.windows("train", size).long()
        openings = torch.cat([begin.expand(len(openings), -1), openings], 1)
    writer = copy.deepcopy(target).to(autocast.dtype)  # as it will be when it decodes
    write_until(written, writer, encoding, chat, openings, budget.enough)
    del writer  # as large as the target
    return Written(target, written, held_out=False), Written(target, written, held_out=True)


class Lessons:
    """What heads learn from and are held to, each text made once and when it is first asked for."""

    def __init__(
        self, config: TrainConfig, target, checkpoint: dict, text, budget: Budget, autocast
    ):
        self.config, self.target, self.checkpoint = config, target, checkpoint
        self.text, self.budget, self.autocast, self.found = text, budget, autocast, {}

    def of(self, name: str) -> tuple:
        """(train, valid) of the head of this name."""
        config = self.config.of_head(name)
        if config.head_data not in self.found:
            if config.head_data == "self":
                about = self.checkpoint, self.text, self.budget
                pair = self_written(config, self.target, *about, self.autocast)
            else:
                pair = corpus(config, self.target, self.text, self.autocast)
            self.found[config.head_data] = pair
        return self.found[config.head_data]


def rounds_of(checkpoint: dict) -> int:
    """How often this head was trained: once, and once more with each --more."""
    return len(checkpoint["training"].get("rounds", [0]))


def train_heads(config: TrainConfig, text: Text | None, device, autocast) -> None:
    """Train the heads that are still missing, then write the table and the plot."""
    folder = config.folder
    target, checkpoint = load_target(folder / "target.pt", device)
    if config.head_window > target.config.context:
        raise UserError(f"--window {config.head_window}: this target reads {target.config.context}")
    target_print = checkpoint["fingerprint"]
    names = [config.head] if config.head else list(HEADS)
    paths = [folder / f"{name}.pt" for name in names]

    def complete(rounds: int) -> bool:
        heads = (load_checkpoint(p, "draft head") if p.is_file() else None for p in paths)
        return all(head is not None and rounds_of(head) >= rounds for head in heads)

    budget = Budget(config, complete)
    lessons = Lessons(config, target, checkpoint, text, budget, autocast)

    def cost(name: str) -> Seconds:
        train, valid = lessons.of(name)
        evaluate = partial(measure_acceptance, target, features=valid, count=64)
        training = HeadTraining(config.of_head(name), name, target, autocast)
        return step_seconds(training, train, evaluate)

    for name in names:
        path, before, own = folder / f"{name}.pt", None, config.of_head(name)
        wanted = head_settings(own, name, target_print)
        if path.is_file():
            before = load_checkpoint(path, "draft head")
            changing = {"round", "head_tokens"} if config.minutes is not None else set()
            same = {k: v for k, v in wanted.items() if k not in changing}
            check_same(path, before["training"]["settings"], same)
            if rounds_of(before) >= budget.round:
                print(f"{name}: trained already")
                continue
        lesson = lessons.of(name)
        budget.share_out(names, cost)
        # A head that comes later goes through the same rounds as the others did.
        done = rounds_of(before) if before else 0
        for number in range(done + 1, budget.round + 1):
            if number > done + 1:
                before = load_checkpoint(path, "draft head")
            if config.minutes is not None:
                tokens = budget.head_tokens(name, number)
                wanted |= {"round": number, "head_tokens": tokens}
            train_head(own, name, target, wanted, *lesson, autocast, before)
    found = [load_checkpoint(folder / f"{name}.pt", "draft head") for name in trained_heads(folder)]
    records = [head["training"] for head in found if head["target"] == target_print]
    (folder / "heads.md").write_text(heads_table(records) + "\n")
    plot_training(folder, [record["name"] for record in records])
    print("\nOn held-out text, of the corpus or of the target's own, drafting along it:")
    print(f"\n{heads_table(records)}\n")
    print(f"written: {folder / 'heads.md'}, {folder / 'training.png'}")


def read_text(config: TrainConfig) -> Text:
    text = Text(config.data, text_packages(asdict(config)), ("train", "valid"))
    about, sizes = text.description, text.description["bytes"].items()
    print(
        f"text: {about['source']} (Python {about['python']}), split {about['hash']}, bytes", end=" "
    )
    print(", ".join(f"{split} {size:,}" for split, size in sizes))
    return text


def get_target(config: TrainConfig, path: Path, text: Text | None, device, autocast) -> None:
    """Import or train the target at `path`, unless it is there already; tokenize the text."""
    if path.is_file():
        checkpoint, wanted = load_checkpoint(path, "target"), target_settings(config, text)
        if config.target is not None:
            wanted |= source_settings(find_source(config.target))
        check_same(path, checkpoint["training"]["settings"], wanted)
        if text is not None:
            text.use(checkpoint["tokenizer"])
        print(f"target: {'imported' if config.target else 'trained'} already")
    elif config.stage == "heads":
        raise UserError(f"there is no target at {path}: train it with --stage target")
    elif config.target is not None:
        import_target(find_source(config.target), path, config.context)
        print(f"target: imported from {config.target}")
        if text is not None:
            text.use(load_checkpoint(path, "target")["tokenizer"])
    else:
        if config.tokenizer != "bpe":
            text.use({"name": config.tokenizer})
        else:
            start = time.monotonic()
            documents = text.documents["train"]
            text.use(data.learn_tokenizer([d.text for d in documents], config.vocab_size))
            took = time.monotonic() - start
            print(f"tokenizer: {text.encoding.n_vocab} tokens learnt in {took:.0f} s")
        train_target(config, text, device, autocast)


def choose_autocast(config: TrainConfig, device: torch.device) -> Autocast:
    """The dtype to compute in: bfloat16 where it is asked for, or faster."""
    fast = bfloat16_cost(device) < 0.7
    low = config.dtype == "bfloat16" or config.dtype == "auto" and fast
    reason = "bfloat16 is " + ("faster here" if fast else "not faster here")
    print(f"{describe_device(device)}, {'bfloat16 autocast' if low else 'float32'} ({reason})")
    return Autocast(device, torch.bfloat16 if low else torch.float32)


def main() -> None:
    config = parse(TrainConfig, presets=PRESETS | {"pretrained": PRETRAINED})
    device = choose_device(config.device)
    autocast = choose_autocast(config, device)
    keep_freed_memory()
    # A pretrained target that writes its own text needs no other.
    text = read_text(config) if config.needs_text else None
    config.folder.mkdir(parents=True, exist_ok=True)
    print(f"run: {config.folder}")
    get_target(config, config.folder / "target.pt", text, device, autocast)
    if config.stage != "target":
        train_heads(config, text, device, autocast)


if __name__ == "__main__":
    run(main)
