"""Which run is meant, and its target and head made ready for decoding.

A run is a folder with a target and its heads. Unless one is named, it is the newest of your own
under out/. Where there is none yet, it is trained/cpu, which came with the code; whatever is
written beside that goes under out/. A run of a pretrained target that came with the code has heads
alone: target.json names the model, which is read from its own package, once.
"""

import copy
import json
import statistics
from pathlib import Path

import torch

from costs import LENGTH, Bench
from plumbing.cli import UserError
from plumbing.files import (
    as_other_version,
    atomic_write,
    check_writable,
    load_checkpoint,
    save_checkpoint,
)
from plumbing.machine import choose_device
from targets.bpe import build_encoding
from targets.chat import Chat
from targets.graphs import replay_on_a_gpu
from targets.pretrained import find_source, import_target
from targets.runs import fingerprint, head_path, load_head, load_target, trained_heads

TRAINED = Path(__file__).parent.parent / "trained"
NOT_MEANT = "smoke"  # a run of nonsense: it has to be asked for
FAVOURITE = "eagle-koala"
CLEAR = 0.75  # of the time of float32: a target that takes less in bfloat16 is decoded in it
SIZES = "sizes.json"  # in a run's folder: what each size of draft brings
WHICH_RUN = "the run's folder; default: your newest under out/, or trained/cpu"  # of --out_dir

# -------------------------------------------------------------------------------- which run


def find_run(out_dir: str | None, chat: bool = False, needs_head: bool = True) -> Path:
    """The run's folder; None: the newest of your own that has a head, or one of trained/.

    `chat`: whether its target has to be a chat model, where there is one. `needs_head`: false where
    a target alone is enough.
    """
    if out_dir is not None:
        return Path(out_dir)
    newest = {}
    for target in Path("out").glob("*/target.pt"):
        heads = [target.with_name(f"{name}.pt") for name in trained_heads(target.parent)]
        # It may have been read for a run that came along, and be nobody's own.
        alone = not needs_head and not (TRAINED / target.parent.name / "target.json").is_file()
        if (heads or alone) and target.parent.name != NOT_MEANT:
            newest[target.parent] = max(file.stat().st_mtime for file in [*heads, target])
    for folder in sorted(newest, key=newest.get, reverse=True):
        if not chat or "chat" in load_checkpoint(folder / "target.pt", "target").get(
            "tokenizer", ()
        ):
            return folder
    talks = TRAINED / "smollm2"
    return talks if chat and talks.is_dir() else TRAINED / "cpu"


def came_along(folder: Path) -> bool:
    """Whether a run came with the code."""
    return folder.resolve().parent == TRAINED.resolve()


def name_of(folder: Path) -> str:
    """A run as it is shown."""
    return f"trained/{folder.name} (came with the code)" if came_along(folder) else str(folder)


def results_folder(folder: Path) -> Path:
    """Where results about a run are written: its own folder, or one under out/."""
    return Path("out") / f"trained-{folder.name}" if came_along(folder) else folder


def result_file(folder: Path, name: str) -> Path:
    """A file for results about a run. Refused now, not after all the work, if it is unwritable."""
    path = results_folder(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    return path


def target_file(folder: Path) -> Path:
    """The run's target.pt. A pretrained target that it only names is read from its source, once."""
    path, named = folder / "target.pt", folder / "target.json"
    if path.is_file() or not named.is_file():
        return path
    about = json.loads(named.read_text("utf-8"))
    path = Path("out") / about["target"] / "target.pt"
    if not path.is_file():
        source = find_source(about["target"])
        print(f"reading {source.name} into {path}, once")
        import_target(source, path, about["target_context"])
    return path


def copy_target(path: Path) -> None:
    """Put the small target that came with the code at `path`, for heads of your own beside it."""
    print(f"target: that of trained/cpu, which came with the code, copied to {path}")
    with atomic_write(path.with_name("prompts.jsonl")) as file:
        file.write((TRAINED / "cpu" / "prompts.jsonl").read_bytes())
    save_checkpoint(path, load_checkpoint(TRAINED / "cpu" / "target.pt", "target"))


# ------------------------------------------------------------------------- ready for decoding


@torch.inference_mode()
def choose_dtype(name: str, target, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to decode in on `device`, and why. `auto`: the faster one, measured on this target.

    On CUDA that is bfloat16 wherever it is supported. On a CPU it depends on the instructions and
    on the target's size. So a plain step and a pass over 8 tokens are timed in both dtypes.
    bfloat16 rounds more coarsely, and a short timing errs: it has to be a quarter faster (CLEAR),
    so that one machine is likely to give one answer, and with it the same text.
    """
    if name != "auto":
        return getattr(torch, name), "as asked for"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "supported") if fast else (torch.float32, "bfloat16 unsupported")
    middle = min(LENGTH, target.config.context // 2)
    samples = {torch.float32: [], torch.bfloat16: []}
    benches = {dtype: Bench(copy.deepcopy(target).to(dtype), middle, 8) for dtype in samples}
    for _ in range(6):
        for dtype, bench in benches.items():
            samples[dtype].append(bench.read(1) + bench.read(8))
    float32, bfloat16 = (statistics.median(values[1:]) for values in samples.values())
    ratio = bfloat16 / float32
    why = f"a pass in bfloat16 takes {ratio:.2f} times as long as in float32"
    if ratio < CLEAR:
        return torch.bfloat16, why
    return torch.float32, why + (f", not below {CLEAR:g}" if ratio < 1 else "")


@torch.inference_mode()
def check_numbers(target, folder: Path) -> None:
    """Raise UserError for a target that overflows: finite weights can be too large as well."""
    token = torch.zeros(1, 1, dtype=torch.long, device=target.embed.weight.device)
    if not target.lm_head(target(token)).isfinite().all():
        raise UserError(f"the target of {folder} writes no numbers: its weights are damaged")


def add_sizes(folder: Path, heads: dict) -> None:
    """Give heads {name: head} of a run what study/sizes.py found of them, as `head.sizes`.

    Nothing where nobody has measured these very weights.
    """
    for path in (results_folder(folder) / SIZES, folder / SIZES):
        try:
            found = json.loads(path.read_text("utf-8"))
            for name, head in heads.items():
                if name in found and found[name]["weights"] == fingerprint(head):
                    head.sizes = {key: found[name][key] for key in ("greedy", "sampled", "lookup")}
            return
        except (OSError, ValueError, KeyError, TypeError):
            continue


def load_heads(folder: Path, names: list[str], target) -> dict:
    """{name: head} of a run, for the target that `load` made ready."""
    heads = {n: load_head(head_path(folder, n), target, target.about["fingerprint"]) for n in names}
    add_sizes(folder, heads)
    return heads


def load(out_dir=None, head="auto", device="auto", dtype="auto", compile=False):
    """(target, head, encoding) of a trained run, ready for `generate`.

    `out_dir=None`: see `find_run`. `head` is the name of a head in the run, a path, or None; auto
    is eagle-koala, or where there is none the run's first. `target.why_dtype` tells why the target
    has its dtype, `target.about` is its checkpoint without the weights. `target.chat` is the form
    of its conversations, a `chat.Chat`; None for a target without conversations.
    """
    folder, device = find_run(out_dir), choose_device(device)
    path = target_file(folder)
    target, checkpoint = load_target(path)  # on the CPU: a GPU need not hold it in float32 as well
    with as_other_version(path):
        encoding = build_encoding(checkpoint["tokenizer"])
        chat = Chat.of(encoding, checkpoint["tokenizer"])
    chosen, target.why_dtype = choose_dtype(dtype, target, device)
    target.to(device, chosen)
    target.about = {key: value for key, value in checkpoint.items() if key != "weights"}
    target.chat = chat
    check_numbers(target, folder)
    if compile:
        replay_on_a_gpu(target)
    if head is not None:
        path = head_path(folder, favourite(folder) if head == "auto" else head)
        head = load_head(path, target, checkpoint["fingerprint"])
        add_sizes(folder, {path.stem: head})
    return target, head, encoding


def favourite(folder: Path) -> str:
    """The head that is taken where none is named."""
    names = trained_heads(folder)
    return FAVOURITE if FAVOURITE in names or not names else names[0]
