"""Trained runs: a folder with a target and its draft heads, as train.py leaves it."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from chat import Chat
from cli import UserError, choose_device, compile_layers
from costs import choose_dtype
from data import build_encoding
from draft_head import KINDS, HeadConfig, build_head
from model import GPT, fingerprint, load_checkpoint, load_target, save_checkpoint


def find_run(out_dir: str | None) -> Path:
    """The run's folder; None is the newest one that has a target."""
    if out_dir is not None:
        return Path(out_dir)
    targets = sorted(Path("out").glob("*/target.pt"), key=lambda path: path.stat().st_mtime)
    if not targets:
        raise UserError(
            "there is no trained run under out/: run `python train.py` first (about an hour on "
            "two CPU cores), or `python train.py --preset smoke` (half a minute, writes nonsense)"
        )
    return targets[-1].parent


def load(
    out_dir=None, head: str | None = "eagle-koala", device="auto", dtype="auto", compile=False
):
    """(target, head, encoding) of a trained run, ready for `generate`.

    `out_dir=None` is the newest run; `head` is the name of a head in it, a path, or None. Why the
    target has its dtype is kept as `target.why_dtype`, and how one talks with it, a `chat.Chat`, as
    `target.chat` (None for one that only goes on with a text).
    """
    folder, device = find_run(out_dir), choose_device(device)
    # Read on the CPU: a GPU has to hold no more than what it will decode with.
    target, checkpoint = load_target(folder / "target.pt")
    chosen, target.why_dtype = choose_dtype(dtype, target, device)
    target.to(device, chosen)
    if compile:
        compile_layers(target)
    if head is not None:
        head = load_head(head_path(folder, head), target, checkpoint["fingerprint"])
    encoding = build_encoding(checkpoint["tokenizer"])
    target.chat = Chat.of(encoding, checkpoint["tokenizer"])
    return target, head, encoding


def head_path(folder: Path, head: str) -> Path:
    """Where the head of this name, or at this path, is. Raises UserError, naming those there are."""
    path = Path(head) if head.endswith(".pt") else folder / f"{head}.pt"
    if not path.is_file() and (names := trained_heads(folder)):
        raise UserError(f"there is no head at {path}; trained here: {', '.join(names)}")
    return path


def save_head(path: Path, head: nn.Module, target_fingerprint: str, training: dict) -> None:
    """`training`: how it was trained and what it reached, as plain values."""
    checkpoint = {
        "kind": "draft head",
        "config": asdict(head.config),
        "target": target_fingerprint,
        "weights": head.state_dict(),
        "training": training,
    }
    save_checkpoint(path, checkpoint)


def load_head(path: Path, target: GPT, target_fingerprint: str | None = None) -> nn.Module:
    """The head at `path`, on the target's device and of its dtype, for decoding.

    Raises UserError where it was trained for another target: it would draft nonsense.
    """
    checkpoint = load_checkpoint(path, "draft head")
    if checkpoint["target"] != (target_fingerprint or fingerprint(target)):
        raise UserError(f"{path} was trained for another target: train it anew with train.py")
    head = build_head(HeadConfig(**checkpoint["config"]), target)
    head.load_state_dict(checkpoint["weights"])
    head.training_record = checkpoint["training"]
    return head.to(target.embed.weight.dtype).eval().requires_grad_(False)


def trained_heads(folder: Path) -> list[str]:
    """The names of the heads in a run's folder."""
    names = [path.name.removesuffix(".pt") for path in folder.glob("*.pt")]
    return sorted(n for n in names if n.startswith(tuple(KINDS)) and ".progress" not in n)
