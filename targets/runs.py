"""The files of a trained run: a target and its draft heads, in one folder, from train.py.

Every file is a dictionary of plain values and tensors. A head knows its target by a fingerprint.
loading.py makes a run ready for decoding.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from draft_head import KINDS, HeadConfig, build_head
from model import GPT, GPTConfig
from plumbing.cli import UserError
from plumbing.files import as_other_version, load_checkpoint, save_checkpoint, stored
from plumbing.progress import check_same
from targets.graphs import ReplayedGPT, replay_passes
from targets.text import Text

# Settings of the first edition (up to commit 70beb28) -> their present names.
OLD_NAMES = {
    "vocab_size": "target_vocab",
    "context": "target_context",
    "num_layers": "target_layers",
    "width": "target_width",
    "attention_heads": "target_heads",
    "mlp_width": "target_mlp_width",
    "window": "head_window",
    "supervised_share": "joint_from",
}


def settings_of(path: Path, checkpoint: dict) -> dict:
    """The training settings of a target or a head at `path`, by their present names.

    Raises UserError for a head that only the first edition could train.
    """
    with as_other_version(path):
        old = dict(checkpoint["training"]["settings"])
    for name, gone in (("round", "in rounds of --minutes"), ("supervised", "with the LK loss")):
        if old.get(name) not in (None, "paper"):
            raise UserError(
                f"{path} was trained {gone}, which commit 70beb28 was the last to do: "
                f"it decodes, but to train one like it choose another name"
            )
    return {OLD_NAMES.get(name, name): value for name, value in old.items()}


# ------------------------------------------------------------------------------ the target


def fingerprint(model: nn.Module) -> str:
    """A short hash of a target's or a head's shape and weights: a head knows its target by it."""
    # Empty fields do not count, so a new field does not disown old heads.
    shape = {name: value for name, value in asdict(model.config).items() if value != ()}
    digest = hashlib.sha256(repr(shape).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()[:16]


def save_target(path: Path, target: GPT, tokenizer: dict, training: dict) -> None:
    """Write a target with its tokenizer and its training record, as plain values."""
    checkpoint = {"kind": "target", "config": asdict(target.config), "weights": stored(target)}
    checkpoint |= {"tokenizer": tokenizer, "fingerprint": fingerprint(target), "training": training}
    save_checkpoint(path, checkpoint)


def load_target(path: Path, device="cpu", dtype=torch.float32) -> tuple[GPT, dict]:
    """The target at `path`, frozen, and its checkpoint."""
    checkpoint = load_checkpoint(path, "target")
    with as_other_version(path):
        target = GPT(GPTConfig(**checkpoint["config"]))
        target.load_state_dict(checkpoint["weights"])
        if fingerprint(target) != checkpoint["fingerprint"]:
            raise UserError(f"{path} is damaged: its weights do not match their fingerprint")
    return target.to(device, dtype).eval().requires_grad_(False), checkpoint


def get_target(path: Path, known_by: dict, make: Callable[[], None], text: Text | None) -> None:
    """Have a target at `path`: the one that is there, else `make` writes it. It tokenizes `text`.

    `known_by`: the settings that it has to have been made with. Raises UserError where they differ.
    """
    if not (there := path.is_file()):
        make()
    checkpoint = load_checkpoint(path, "target")
    known = settings_of(path, checkpoint)
    if text is not None and not text.given and "text" in known_by:
        others = {name: value for name, value in known_by.items() if name != "text"}
        check_same(path, known, others)
        text.expect(known.get("text"))
    else:
        check_same(path, known, known_by)
    if there:
        print("target: there already")
    if text is not None and text.tokenizer is None:  # no tokens were needed yet
        text.use(checkpoint["tokenizer"])


# ----------------------------------------------------------------------------- a run's folder


def head_path(folder: Path, head: str) -> Path:
    """The path of a head, by its name or a path. Raises UserError with the names of those here."""
    path = Path(head) if head.endswith(".pt") else folder / f"{head}.pt"
    if not path.is_file() and (names := trained_heads(folder)):
        raise UserError(f"there is no head at {path}; trained here: {', '.join(names)}")
    return path


def save_head(path: Path, head: nn.Module, target_fingerprint: str, training: dict) -> None:
    """`training`: the record of its training and its held-out figures, as plain values."""
    checkpoint = {"kind": "draft head", "config": asdict(head.config), "target": target_fingerprint}
    checkpoint |= {"weights": stored(head), "training": training}
    save_checkpoint(path, checkpoint)


def load_head(path: Path, target: GPT, target_fingerprint: str | None = None) -> nn.Module:
    """The head at `path`, on the target's device and in its dtype, for decoding.

    Raises UserError for a head of another target: it would draft nonsense.
    """
    checkpoint = load_checkpoint(path, "draft head")
    with as_other_version(path):
        if checkpoint["target"] != (target_fingerprint or fingerprint(target)):
            raise UserError(f"{path} was trained for another target: train it anew with train.py")
        head = build_head(HeadConfig(**checkpoint["config"]), target)
        head.load_state_dict(checkpoint["weights"])
        head.training_record = checkpoint["training"]
    head = head.to(target.embed.weight.dtype).eval().requires_grad_(False)
    if isinstance(target, ReplayedGPT):
        replay_passes(head, target.passes)
    return head


def trained_heads(folder: Path) -> list[str]:
    """The names of the heads in a run's folder."""
    names = [path.name.removesuffix(".pt") for path in folder.glob("*.pt")]
    return sorted(n for n in names if n.startswith(tuple(KINDS)) and ".progress" not in n)


def weights_to_start(path: Path, shape: HeadConfig, target: GPT, target_print: str) -> dict:
    """The weights of the head that --init names. Raises UserError where they do not fit."""
    checkpoint = load_checkpoint(path, "draft head")
    with as_other_version(path):
        if checkpoint["target"] != target_print:
            raise UserError(f"--init {path}: that head was trained for another target")
        if HeadConfig(**checkpoint["config"]) != shape:
            raise UserError(f"--init {path}: that head has another shape: {shape}")
        build_head(shape, target).load_state_dict(checkpoint["weights"])  # refused here if at all
    return checkpoint["weights"]
