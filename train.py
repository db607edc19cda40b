"""Training: first the target, then draft heads that learn to guess its next tokens.

**Target.** Trained on the text (targets/small.py) or pretrained elsewhere (targets/pretrained.py);
then frozen for good. Heads learn from its hidden states: on the text (targets/features.py), or on
text that the target writes itself (targets/written.py).

**Head, supervised.** L_sup: see `supervised_loss` of each kind in draft_head.py.

**Head and discriminator, joint** (KOALA, arXiv 2408.08146). First comes the supervised part, 60 %
of the head's steps: before its plateau an adversarial term only slows the head. Then D alone learns
for some hundred steps, the head held fixed. Then the two alternate on each batch:

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

`HeadTraining.joint_step` is these two lines. lambda = 0 is plain supervised training: same batches,
same number of head steps, and no D. Ten times or so the head is evaluated on held-out text. The one
that is kept has the largest `tau_estimate` (costs.py), not the lowest loss.

`python train.py` trains the target and four heads: {medusa, eagle} x {original: K = 1, lambda = 0;
KOALA: K = 2, lambda > 0}. It can be interrupted at any time: the same command goes on where it
stopped. Read next: costs.py.
"""

import plumbing.early  # noqa: F401

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costs import measure_acceptance
from discriminator import (
    Discriminator,
    adversarial_loss,
    discriminator_loss,
    exact_logits,
    in_parts,
)
from draft_head import Batch, Guess, HeadConfig, build_head
from plumbing.cli import UserError, parse, run
from plumbing.curves import heads_table, plot_training
from plumbing.files import load_checkpoint, only_writer, round_weights
from plumbing.machine import Autocast, choose_autocast, choose_device, keep_heap, origin, trim_heap
from plumbing.progress import (
    LOG_LINES,
    Progress,
    batch_indices,
    check_same,
    dose,
    is_due,
    schedule,
)
from plumbing.rows import in_pieces
from recipe import PRESETS, TrainConfig, head_settings, target_settings, usual_preset
from sampling import probabilities
from targets.features import corpus, evenly
from targets.loading import came_along, copy_target
from targets.pretrained import find_source, import_target, source_settings
from targets.runs import (
    get_target,
    load_target,
    save_head,
    settings_of,
    trained_heads,
    weights_to_start,
)
from targets.small import train_target
from targets.text import Text, packages_for, read_text
from targets.written import self_written

EVALUATIONS = 10  # of each head on held-out text
EVALUATED = 64  # windows of held-out text, each time

# ------------------------------------------------------------------------------- the joint step


def update(optimizer, rate: float, loss: Tensor, clip: bool = False) -> None:
    """One step of an optimizer at this learning rate."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


class HeadTraining:
    """A head and its discriminator, if it has one, with their optimizers and the step they make.

    In shapes N is the number of rows, the places of a batch where one draft position is to be
    learnt; S the number of tokens that the head can guess; D the width of a state.
    """

    def __init__(
        self,
        target,
        head,
        discriminator: Discriminator | None,
        weight: float,
        autocast: Autocast,
        head_lr: float = 2e-3,
        discriminator_lr: float = 1e-3,
        feature_weight: float = 1.0,
        labels: str = "own",
        form: str = "learnt",
    ):
        """`weight`: lambda. `discriminator=None`: L_adv takes the best one, D* = p / (p + q).
        `labels`, and `form`, that of D: see recipe.py.
        """
        self.target, self.head, self.discriminator = target, head, discriminator
        self.weight, self.autocast, self.feature_weight = weight, autocast, feature_weight
        self.head_lr, self.discriminator_lr, self.form = head_lr, discriminator_lr, form
        usual = "soft" if head.learns_p else "hard"
        self.labels = usual if labels == "own" else labels
        self.optimizer = torch.optim.AdamW(
            head.parameters(), lr=head_lr, betas=(0.9, 0.95), fused=True
        )
        if discriminator is not None:
            weights = discriminator.parameters()
            self.d_optimizer = torch.optim.Adam(weights, lr=discriminator_lr, betas=(0.5, 0.9))

    def parts(self) -> dict:
        """The modules and optimizers that make up the state of this training."""
        parts = {"head": self.head, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts |= {"discriminator": self.discriminator, "d_optimizer": self.d_optimizer}
        return parts

    def begin(self, train) -> None:
        """Choose the tokens that the head can guess, and start it in closed form."""
        self.head.vocabulary.choose(train.counts().to(self.target.embed.weight.device))
        self.ready()
        # Windows of 16,384 tokens in all, for 2 D + 1 unknowns: 513, or 1,153 beside SmolLM2.
        count = 2**14 // (train.windows.shape[1] - 1)
        self.head.prepare(self.target, self.batch(train, evenly(torch.arange(len(train)), count)))

    def ready(self) -> None:
        """Take the part of the LM head (S, D) for the tokens that the head can guess by now."""
        lm_head = self.head.vocabulary.rows(self.target.lm_head.weight.detach())
        self.lm_head = lm_head.to(self.autocast.dtype)
        at_once = 2**21 if lm_head.device.type == "cpu" else 2**27  # logits: 8 MB, on a GPU 512 MB
        self.piece = max(32, at_once // len(lm_head))  # rows of a batch in a piece
        if self.discriminator is not None:
            self.discriminator.set_lm_head(self.lm_head)

    def batch(self, data, windows: Tensor, noise_seed: int | None = None) -> Batch:
        """These windows of the data, the tokens that the head is to learn marked.

        A head that learns p learns from every token: in a chat p teaches the target's language
        also where the user speaks. A head that learns tokens takes the target's own. Tokens that
        the head cannot guess are left out. `noise_seed`: for the noise on EAGLE's input.
        """
        if noise_seed is not None:
            torch.manual_seed(noise_seed)
        batch = data.batch(windows)
        learn = torch.ones_like(batch.learn) if self.labels == "soft" else batch.learn
        return batch._replace(learn=learn & (self.head.vocabulary.indices_of(batch.tokens) >= 0))

    # ---------------------------------------------------------------------------- the step

    def joint_step(self, batch: Batch, part: str, own_steps: int, rate=1.0, log=False) -> dict:
        """One step of the head and, in the joint part, one of D before it.

        `part`: "supervised", "D alone" or "joint". `own_steps`: the draft positions that EAGLE
        learns by now. `rate`: share of both peak learning rates. D slows down with the head: a D
        that still leaps beside a head at rest forgets its knowledge (study/LOG.md). The head's
        gradient is clipped. A batch whose last draft position has no row changes nothing. Returns
        the figures of `in_parts` if `log`, else {}.
        """
        positions = self.head.max_draft or own_steps
        if not batch.learn[:, positions + 1 :].any():
            return {}  # the last draft position would have no row
        with self.autocast(), torch.set_grad_enabled(part != "D alone"):
            guess = self.head(batch, own_steps)

        # D: one step on L_D, the head held fixed.
        if part != "supervised" and self.discriminator is not None:
            with self.autocast():
                loss = self.d_loss(guess.detach(), batch)
            update(self.d_optimizer, self.discriminator_lr * rate, loss)
        if part == "D alone":
            return {}

        # Head: one step on L_sup + lambda L_adv, D held fixed.
        weight, figures = self.weight if part == "joint" else 0.0, {}
        with self.autocast():
            if log:
                loss, figures = in_parts(self, guess, batch, weight)
            else:
                loss = self.head_loss(guess, batch, 1.0, weight)
        update(self.optimizer, self.head_lr * rate, loss, clip=True)
        return figures

    def d_loss(self, guess: Guess, batch: Batch) -> Tensor:
        """L_D, the weighted sum over draft positions.

        `in_pieces` takes a mean over rows with its gradient, some rows at a time: the logits (N, S)
        of all rows are never there at once.
        """
        total = 0.0
        for index, weight, (state, h_from, h_to, token), to_logits in self.positions(guess, batch):
            rows = self.context(index, h_from, h_to, state), state, h_to, token
            total = total + weight * in_pieces(self.d_loss_at, self.piece, rows, to_logits)
        return total

    def head_loss(self, guess: Guess, batch: Batch, sup=1.0, adv=0.0) -> Tensor:
        """sup * L_sup + adv * L_adv, the weighted sum over draft positions."""
        total = 0.0
        for index, weight, rows, to_logits in self.positions(guess, batch):
            loss_at = partial(self.head_loss_at, index, sup, adv)
            total = total + weight * in_pieces(loss_at, self.piece, rows, to_logits)
        return total

    def positions(self, guess: Guess, batch: Batch):
        """Yields (index, weight, rows, map to logits) of each draft position i = index + 1.

        A row is a place t whose token x_{t+1+i} is to be learnt. rows: state (N, D), the head's
        guess of h_{t+i}, or Medusa's counterpart; h_from (N, D), the h_t that the draft began from;
        h_to (N, D), the target's own h_{t+i}; token (N,), the index of x_{t+1+i}.
        """
        for i, (state, to_logits) in enumerate(zip(guess.states, guess.maps), start=1):
            h_from = batch.rows(batch.hidden[:, :-i], i)
            h_to = batch.rows(batch.hidden[:, i:], i)
            token = self.head.vocabulary.indices_of(batch.rows(batch.tokens[:, i + 1 :], i))
            rows = state, h_from, h_to, token
            yield i - 1, self.head.position_weights[i - 1], rows, to_logits.to(self.lm_head.dtype)

    def d_loss_at(self, context, state, h_to, token, to_logits) -> Tensor:
        """L_D of one draft position, for a piece of its rows.

        `context`: g and b of each row, made before `in_pieces`, which hands a gradient on to its
        inputs only: through them it reaches D's weights.
        """
        q = probabilities(state, to_logits)  # (N, S), as p
        if self.form == "blind":
            p = F.one_hot(token, q.shape[-1]).to(q.dtype)
        else:
            p = probabilities(h_to, self.lm_head)
        return discriminator_loss(self.discriminator.score(context).float(), p, q)

    def head_loss_at(self, index, sup, adv, state, h_from, h_to, token, to_logits) -> Tensor:
        """sup * L_sup + adv * L_adv of one draft position, for a piece of its rows."""
        logits = F.linear(state, to_logits).float()  # (N, S)
        needs_p = self.labels == "soft" or (adv and self.discriminator is None)
        p = probabilities(h_to, self.lm_head) if needs_p else None
        label = {"soft": p, "hard": token, "none": None}[self.labels]
        loss = sup * self.head.supervised_loss(logits, label, state, h_to, self.feature_weight)
        if adv:
            q = logits.softmax(-1)  # the lesson of the discriminator comes through q alone
            loss = loss + adv * adversarial_loss(self.judged(index, h_from, h_to, state, p, q), q)
        return loss

    @torch.no_grad()
    def judged(self, index: int, h_from, h_to, state, p: Tensor | None, q: Tensor) -> Tensor:
        """D's logits (N, S), without a gradient. p and q: for the closed form alone."""
        if self.discriminator is None:
            return exact_logits(p, q)
        return self.discriminator.score(self.context(index, h_from, h_to, state)).float()

    def context(self, index: int, h_from: Tensor, h_to: Tensor, state: Tensor) -> Tensor:
        """g and b of each row, from what a D of this form is shown of h+ and the head's guess."""
        if self.form != "learnt":
            h_to = state if self.form == "blind" else h_to - state
        return self.discriminator.context(h_from, h_to, index)


# ----------------------------------------------------------------------------------- the loop


def shape_of(config: TrainConfig, name: str, target) -> HeadConfig:
    """The shape of the head of this name."""
    layers, _ = config.layers_and_weight(name)
    vocab = config.draft_vocab if config.draft_vocab < target.config.vocab_size else 0
    kind, width = name.split("-")[0], config.head_mlp_width
    return HeadConfig(kind, layers, draft_vocab=vocab, mlp_width=width)


def new_training(config: TrainConfig, name: str, target, autocast: Autocast) -> HeadTraining:
    """The untrained head of this name and its discriminator, if it has a learnt one."""
    torch.manual_seed(config.seed)
    head, discriminator = build_head(shape_of(config, name, target), target), None
    _, weight = config.layers_and_weight(name)
    if weight > 0 and config.discriminator != "exact":
        rows = head.vocabulary.rows(target.lm_head.weight)
        discriminator = Discriminator(rows, head.max_draft or config.own_steps).to(rows.device)
    how = config.head_lr, config.discriminator_lr, config.feature_weight, config.labels
    return HeadTraining(target, head, discriminator, weight, autocast, *how, config.discriminator)


def train_head(
    config: TrainConfig, name: str, target, settings: dict, train, valid, autocast, extra=None
) -> None:
    """Train one head on `train`, select its best state on `valid`, write it to NAME.pt.

    `config`: its own settings (`config.of_head`); `settings`: the recorded ones of them.
    `extra(target, head, batch)`: further figures on held-out text for the record. Raises UserError
    where no evaluation gave a number: the head diverged.
    """
    training = new_training(config, name, target, autocast)
    head, seed = training.head, config.seed
    tokens_per_step = config.windows_per_step * config.window
    steps = max(1, config.head_tokens // tokens_per_step)
    joint_from = int(config.joint_from * steps) if training.weight > 0 else steps
    in_progress = settings | {"dtype in use": str(autocast.dtype)}
    progress = Progress(config.folder, name, steps, in_progress, training.parts())

    def measure(count: int = EVALUATED, by=measure_acceptance, **more) -> dict:
        head.eval()
        figures = by(target, head, valid.batch(evenly(torch.arange(len(valid)), count)), **more)
        head.train()
        return figures

    if progress.step == 0 and config.init is None:
        training.begin(train)
    else:
        if progress.step == 0:
            head.load_state_dict(
                weights_to_start(Path(config.init), head.config, target, settings["target"])
            )
            progress.keep_if_best(measure()["tau_estimate"], head, step=0)
        training.ready()
    coverage = head.vocabulary.coverage(valid.counts().to(target.embed.weight.device))
    head.train()
    if head.config.draft_vocab:
        print(f"{name}: guesses {config.draft_vocab} tokens, {coverage:.2%} of held-out text")

    for step in progress:
        if step == joint_from and training.discriminator is not None:
            print(f"{name}: {config.discriminator_steps} steps of the discriminator alone")
            progress.save()
            for d_step in range(config.discriminator_steps):
                windows = batch_indices(len(train), config.windows_per_step, d_step, seed + 2)
                batch = training.batch(train, windows, (seed + 2) * 7919 + d_step)
                training.joint_step(batch, "D alone", config.own_steps)
                progress.raise_if_interrupted()
        log = is_due(step, steps, LOG_LINES)
        own_steps = config.own_steps if step >= int(config.own_from * steps) else 1
        part = "joint" if step >= joint_from else "supervised"
        windows = batch_indices(len(train), config.windows_per_step, step, seed)
        batch = training.batch(train, windows, seed * 7919 + step)  # all a function of the step
        figures = training.joint_step(batch, part, own_steps, schedule(step, steps), log)
        if is_due(step, steps, EVALUATIONS):
            figures |= measure()
            progress.keep_if_best(figures["tau_estimate"], head)
        if log or "tau_estimate" in figures:
            progress.log(tokens_per_step, **figures)
            trim_heap()
    if progress.best is None:
        raise UserError(f"{name} diverged: try a lower --head_lr or --adversarial_weight")
    head.load_state_dict(progress.best)
    round_weights(head)
    seconds = progress.elapsed()
    held_out = measure(len(valid), by_rank=True) | (measure(len(valid), extra) if extra else {})
    record = {
        "name": name,
        "settings": settings,
        "origin": origin(),
        "dtype": str(autocast.dtype),
        "kept_step": progress.best_step,  # 0: the head it started from
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "windows": len(train),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in head.parameters()),
        "coverage": coverage,  # share of held-out text whose tokens it can guess
        "dose": dose(joint_from, steps) if training.weight > 0 else None,
        "valid": held_out,
        "log": [row for row in progress.rows if "tau_estimate" in row],
    }
    save_head(config.folder / f"{name}.pt", head, settings["target"], record)
    progress.finish()


# --------------------------------------------------------------------------------------- main


def head_data(config: TrainConfig, target, checkpoint: dict, text: Text | None, autocast) -> tuple:
    """(train, valid): the windows that a head learns from and is evaluated on.

    `config`: the head's own settings (`config.of_head`).
    """
    if config.head_data == "corpus":
        return corpus(target, text, config.window, config.head_data_tokens, autocast)
    folder, sizes = config.folder / "conversations", (config.window, config.written_tokens)
    return self_written(folder, target, checkpoint, text, *sizes, config.seed, autocast.dtype)


def train_heads(config: TrainConfig, text: Text | None, autocast: Autocast) -> None:
    """Train the heads that are still missing, then write the table and the plot."""
    folder, data = config.folder, {}
    target, checkpoint = load_target(folder / "target.pt", autocast.device)
    if config.window > target.config.context:
        raise UserError(f"--head_window {config.window}: this target reads {target.config.context}")
    target_print = checkpoint["fingerprint"]
    for name in config.heads:
        path, own = folder / f"{name}.pt", config.of_head(name)
        settings = head_settings(own, name, target_print)
        if path.is_file():
            check_same(path, settings_of(path, load_checkpoint(path, "draft head")), settings)
            print(f"{name}: trained already")
            continue
        if own.init is not None:  # refused before any text is written
            weights_to_start(Path(own.init), shape_of(own, name, target), target, target_print)
        if own.head_data not in data:
            data[own.head_data] = head_data(own, target, checkpoint, text, autocast)
        train_head(own, name, target, settings, *data[own.head_data], autocast)
    found = [load_checkpoint(folder / f"{name}.pt", "draft head") for name in trained_heads(folder)]
    records = [head["training"] for head in found if head["target"] == target_print]
    (folder / "heads.md").write_text(heads_table(records) + "\n", "utf-8")
    plot_training(folder, [record["name"] for record in records])
    print("\nOn held-out text, of the corpus or of the target's own, drafting along it:")
    print(f"\n{heads_table(records)}\n")
    print(f"written: {folder / 'heads.md'}, {folder / 'training.png'}")


def main() -> None:
    config = parse(TrainConfig, presets=PRESETS, about=__doc__, usual=usual_preset)
    if came_along(config.folder):
        raise UserError(f"{config.folder} came with the code: train beside it by --preset lab")
    autocast = choose_autocast(config.dtype, choose_device(config.device))
    keep_heap()
    path = config.folder / "target.pt"
    # A pretrained target that writes its own text needs no other.
    text = read_text(config.data, packages_for(config.target_vocab)) if config.needs_text else None
    beside = " (beside the target that came with the code)" if config.preset == "lab" else ""
    print(f"run: {config.folder}{beside}")
    with only_writer(config.folder):
        known_by = target_settings(config)
        if config.target is not None:
            source = find_source(config.target)
            make = partial(import_target, source, path, config.target_context)
            known_by |= source_settings(source)
        else:
            known_by |= {"text": text.description["hash"]}
            how = dict(tokens=config.target_tokens, learning_rate=config.target_lr)
            how |= dict(batch_tokens=config.batch_tokens, optimizer=config.optimizer)
            how |= dict(known_by=known_by, autocast=autocast)
            anew = partial(train_target, path, text, config.gpt(), config.seed, **how)
            make = partial(copy_target, path) if config.preset == "lab" else anew
        get_target(path, known_by, make, text)
        if config.heads:
            train_heads(config, text, autocast)


if __name__ == "__main__":
    run(main)
