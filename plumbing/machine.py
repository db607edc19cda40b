"""The machine: its device, the dtypes it is fast in, its clock, the memory of the C library.

And the origin of a result: the command, its date, the commit and the versions that made it.
"""

import ctypes
import math
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from plumbing.cli import UserError


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU. Asked for and absent: UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # as unusable as any other
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine shows torch no CUDA GPU; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA GPUs")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # so that this is the one that is waited for and timed
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def bfloat16_cost(device: torch.device) -> float:
    """The time of a matrix product in bfloat16, in units of float32's: measured on CPUs.

    A third, where there are instructions for matrices of bfloat16; over twice, where there are some
    for vectors; many times, where there are none.
    """
    if device.type == "cuda":
        return 0.5 if torch.cuda.is_bf16_supported(including_emulation=False) else math.inf
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512, dtype=dtype)
        best[dtype] = math.inf
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] / best[torch.float32]


class Autocast:
    """`with autocast(): ...` computes in `dtype` where torch can, unless that is float32 anyway."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def __call__(self):
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if low else nullcontext()


def choose_autocast(name: str, device: torch.device) -> Autocast:
    """The dtype to train in: bfloat16 where it is asked for, or `auto` and clearly faster."""
    fast = bfloat16_cost(device) < 0.7
    low = name == "bfloat16" or name == "auto" and fast
    reason = "bfloat16 is " + ("faster here" if fast else "not faster here")
    print(f"{describe_device(device)}, {'bfloat16 autocast' if low else 'float32'} ({reason})")
    return Autocast(device, torch.bfloat16 if low else torch.float32)


def commit() -> str | None:
    """The commit of the code, with a + if it has been changed since; None without git."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin() -> dict:
    """What made a result, for its record."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    script = f"-m {module.name}" if module else Path(sys.argv[0]).name
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "tiktoken")},
    }


def synchronized_time(device: torch.device) -> float:
    """Seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds per phase. On CUDA, where calls return before the work is done, by its events."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.laps = [("start", self.now())]

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        self.laps.append((phase, self.now()))

    def seconds(self, last: int | None = None) -> dict[str, float]:
        """Of each phase in all, or in the `last` laps only."""
        if self.cuda:
            torch.cuda.synchronize()
        total = dict.fromkeys(("prefill", "draft", "verify", "other", "callback"), 0.0)
        laps = self.laps if last is None else self.laps[-last - 1 :]
        for (_, begin), (phase, end) in zip(laps, laps[1:]):
            total[phase] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        return total


def glibc():
    """The C library, where it is glibc: on Linux."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


def keep_heap() -> None:
    """Ask glibc to keep freed memory: a training step frees and takes the same gigabyte again.

    Memory that is handed back to the system is cleared by it: 10 % of the training time on two
    cores. Outside Linux there is nothing to do.
    """
    if libc := glibc():
        # M_MMAP_THRESHOLD: take large blocks from the heap as well, but not the largest: their
        # sizes vary, and the gaps would fill 24 GB. Old versions refuse more than 32 MB.
        libc.mallopt(-3, 34 << 20) or libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and never shrink it


def trim_heap() -> None:
    """Give unused memory between blocks in use back to the system.

    Batches differ in their number of tokens to learn, so blocks differ in size, and the gaps
    between them would grow to gigabytes.
    """
    if libc := glibc():
        libc.malloc_trim(0)
