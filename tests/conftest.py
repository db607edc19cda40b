"""What the tests share: a small text, and one tiny run trained on it by the real train.py.

The run is a model of nonsense, but every file of it is real: the tests of training ask how it came
about, the tests of the command lines what can be done with it. It takes a few seconds, once.
"""

import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train
from plumbing import cli
from recipe import PRESETS

torch.set_num_threads(1)  # tiny tensors: a second thread would only wait

# Settings without a flag: tiny sizes, and an optimizer that is not measured anew each time.
PRESETS["smoke"] |= dict(target_heads=2, target_mlp_width=32, optimizer="adamw")
TINY = "--preset smoke --device cpu --dtype float32 --target_vocab 300 --target_context 32"
TINY += " --target_layers 1 --target_width 32 --batch_tokens 256 --target_tokens 20000"
TINY += " --head_data_tokens 4000 --written_tokens 4000 --head_tokens 8000 --discriminator_steps 3"


@dataclass
class Run:
    """The trained run, the flags it was trained with, and what target.pt was before the heads."""

    folder: Path
    flags: list[str]
    target_before_heads: bytes

    @property
    def data(self) -> Path:
        return Path(self.flags[self.flags.index("--data") + 1])


@pytest.fixture
def float64():
    """Everything built in the test is float64, so that a comparison can be sharp."""
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main() as the command line would: call(main, *argv) -> (status, out, err)."""

    def run(main, *argv) -> tuple[int, str, str]:
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, argv)])
        capsys.readouterr()
        status = 0
        try:
            cli.run(main)
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, *capsys.readouterr()

    return run


def sentences(seed: int, size: int) -> str:
    """`size` characters of made-up prose: a small vocabulary, so that a tiny model learns some."""
    rng, text = random.Random(seed), ""
    words = [
        "the",
        "cat",
        "dog",
        "bird",
        "sees",
        "hears",
        "likes",
        "a",
        "small",
        "old",
        "house",
        "tree",
        "river",
        "and",
        "then",
        "sleeps",
    ]
    while len(text) < size:
        text += " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize()
        text += rng.choice([". ", ". ", ".\n", ".\n\n"])
    return text[:size]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Two tasks of sixty files of 2 kB each: enough for all three splits."""
    folder = tmp_path_factory.mktemp("text")
    for task in ("fables", "letters"):
        (folder / task).mkdir()
        for i in range(60):
            (folder / task / f"{i:02}.txt").write_text(sentences(hash_of(task) + i, 2000))
    return folder


def hash_of(task: str) -> int:
    return sum(map(ord, task)) * 1000


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, text_folder) -> Run:
    """The run: the target in one command, then all four heads in another."""
    folder = tmp_path_factory.mktemp("out") / "tiny"
    flags = [*TINY.split(), "--data", str(text_folder)]
    with pytest.MonkeyPatch.context() as patch:
        for only in (["--head", "none"], []):
            patch.setattr(sys, "argv", ["train.py", *flags, "--out_dir", str(folder), *only])
            train.main()
            if only:
                before = (folder / "target.pt").read_bytes()
    return Run(folder, flags, before)
