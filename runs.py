"""Trained runs: a folder with a target and its draft heads, as train.py leaves it."""

from pathlib import Path

from chat import Chat
from cli import UserError, choose_device, compile_layers
from costs import choose_dtype
from data import build_encoding
from draft_head import load_head, trained_heads
from model import load_target


def find_run(out_dir: str | None) -> Path:
    """The run's folder; None is the newest one that has a target."""
    if out_dir is not None:
        return Path(out_dir)
    targets = sorted(Path("out").glob("*/target.pt"), key=lambda path: path.stat().st_mtime)
    if not targets:
        raise UserError(
            "there is no trained run under out/: run `python train.py` first (about 35 minutes on "
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
    target, checkpoint = load_target(folder / "target.pt", device)
    chosen, target.why_dtype = choose_dtype(dtype, target)
    target.to(chosen)
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
