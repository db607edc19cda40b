"""Files that are written whole or not at all, and checkpoints, read without running code.

Trained weights are rounded to bfloat16 before anything is measured with them. So they take half of
the room, and are the same numbers in whichever dtype they are computed with.
"""

import glob
import json
import os
import platform
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from plumbing.cli import UserError

try:
    import fcntl
except ImportError:  # Windows has none: nothing is locked there
    fcntl = None

LOCK = ".lock"  # in a folder, with the number of the process that writes there

# What checkpoints hold at least, by their kind.
PARTS = {
    "target": ("config", "weights", "tokenizer", "fingerprint", "training"),
    "draft head": ("config", "weights", "target", "training"),
}


def runs(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and somebody else's
        pass
    return True


def scratch_of(path: Path) -> Path:
    """A name beside `path` for this process alone. What killed ones left there is removed."""
    here = re.sub(r"\W", "-", platform.node())  # a folder may be shared between machines
    for left in path.parent.glob(f"{glob.escape(f'{path.name}.{here}')}.*.part"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and os.name == "posix" and not runs(int(number)):
            left.unlink(missing_ok=True)
    return path.with_name(f"{path.name}.{here}.{os.getpid()}.part")


@contextmanager
def only_writer(folder: Path, name: str = ""):
    """`with only_writer(folder): ...`: no other process may write there meanwhile.

    `name`: to the files of this name alone. Readers need no lock: every file is whole at any time.
    A lock goes with its process, however that ends. Raises UserError where another process holds
    it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = folder / f"{LOCK}{name}"
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another"
            there = folder / name
            raise UserError(
                f"{there} is being written by process {holder}: wait for it, or stop it first"
            ) from error
        except OSError:  # a file system without locks
            pass
        # Whoever held it may have removed it since we opened it: then it is nobody's lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path):
    """`with atomic_write(path) as file: ...` writes bytes to `path`, all of them or none.

    The bytes go to a file beside `path`, which is renamed when complete. Neither a full disk nor an
    interrupt can leave half a file, or take away the previous one. Raises UserError where nothing
    can be written.
    """
    scratch = scratch_of(path)
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"cannot write {path} (is the disk full?): {error}; nothing was changed there"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise UserError now where `atomic_write` would fail after all the work."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is no file")
        scratch = scratch_of(path)
        scratch.touch()
        scratch.unlink()
    except OSError as error:  # no such folder, a folder that may not be written to
        raise UserError(f"cannot write {path}: {error}") from error


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value).encode() + b"\n")


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Round a module's weights to bfloat16, in place; their dtype stays."""
    for weight in module.parameters():
        weight.copy_(weight.bfloat16())


def stored(module: nn.Module) -> dict:
    """The module's weights for a file: each in bfloat16 where that changes nothing."""
    weights, once = {}, {}  # a matrix with two names is written once
    for name, weight in module.state_dict().items():
        if weight.data_ptr() not in once:
            short = weight.bfloat16() if weight.is_floating_point() else weight
            exact = torch.equal(short.to(weight), weight)
            once[weight.data_ptr()] = short if exact else weight
        weights[name] = once[weight.data_ptr()]
    return weights


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dictionary of tensors and plain values, all of it or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


@contextmanager
def as_other_version(path: Path):
    """Whatever does not fit while a checkpoint's content is used: it is another version's."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else in_a_line(error)
        raise UserError(
            f"{path} was made by another version of this project ({reason}): remove it, and train "
            "anew"
        ) from error


def in_a_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_checkpoint(path: Path, kind: str) -> dict:
    """Read the dictionary that `save_checkpoint` wrote, on the CPU. `kind`: its "kind" entry.

    Raises UserError where the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {kind} at {path}: train one with python train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: in zip, pickle or torch
        reason = in_a_line(error)
        raise UserError(f"{path} is damaged or no checkpoint ({reason}): remove it") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        raise UserError(f"{path} is not the checkpoint of a {kind}")
    with as_other_version(path):
        for part in PARTS.get(kind, ()):
            checkpoint[part]
    return checkpoint
