"""The text: documents, their split, and windows of tokens.

A language model needs text. Every machine with this project already has some: the sources of
Python's own standard library. They are about ten megabytes of code and docstrings, with the prose
of the language reference in `pydoc_data.topics`. `--data` takes any other UTF-8 text.

**Split.** Train 90 %, validation 5 %, test 5 %, by a hash of each document's *group*. A group is a
top-level module, so two files of one package never stand on both sides. Few given files may leave a
part almost empty by chance: then they fill the parts in the order of their hashes. Every choice is
made on validation. The test part serves bench.py alone.

Text on both sides makes every number look better than it is. `overlap` measures its share of the
test part.

bpe.py turns text into tokens.
"""

import hashlib
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from plumbing.cli import UserError
from targets.bpe import build_encoding, token_bytes, tokenize

SPLITS = ("train", "valid", "test")
# Part of each hash that decides a split. Modules differ so much in size that most salts miss
# 90/5/5 by far. This one has the right shares of bytes on Python 3.11. It was picked before any
# model was trained.
SALT = "koala 871 "
LEAST = 5000  # characters of each part
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings"}


@dataclass(frozen=True)
class Document:
    """One text. `group` decides its split. `task` is "" where the text itself tells it (Python)."""

    name: str
    group: str
    text: str
    task: str = ""


# ------------------------------------------------------------------------------------ documents


def python_files(folder: Path, prefix: str = "") -> list[Document]:
    """The Python sources under a folder, without tests; a group is a top-level module."""
    documents = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if NOT_TEXT & set(parts) or parts[0] == "pydoc_data" or parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few files have another encoding on purpose
        name = prefix + "/".join(parts)
        documents.append(Document(name, prefix + parts[0].removesuffix(".py"), text))
    return documents


def standard_library() -> list[Document]:
    """Python's own sources, and the entries of its language reference (task `docs`)."""
    from pydoc_data.topics import topics

    entries = [Document(f"topics/{k}", f"topics/{k}", v, "docs") for k, v in topics.items()]
    return python_files(Path(sysconfig.get_paths()["stdlib"])) + entries


def installed_packages(names: tuple[str, ...]) -> list[Document]:
    """The sources of installed packages: more text of the same kind for a larger model."""
    found = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            found += python_files(Path(spec.origin).parent, prefix=name + "/")
    return found


def read_paths(paths: list[str]) -> list[Document]:
    """UTF-8 files, and folders of them. In a folder, files without text are passed over.

    The task is the top-level folder. A text that was there already, by another name or a link, is
    left out. Data in few files would leave a split empty. So a file of more
    than a twentieth of the data is cut at line ends. Its parts have about 1 % each, and each part
    is a group of its own.
    """
    files, other, seen = [], [], set()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--data: {path} does not exist")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inside:
            relative = file.relative_to(path) if path.is_dir() else Path(file.name)
            try:
                text = file.read_text("utf-8")
                if "\0" in text:
                    raise UnicodeError("it holds NUL bytes")
            except (OSError, UnicodeError) as error:
                if path.is_dir():
                    other += [] if is_binary(file) else [relative]
                    continue
                raise UserError(f"--data: {file} cannot be read as UTF-8 text: {error}") from error
            if (print_of := digest(text)) in seen:
                continue
            seen.add(print_of)
            task = relative.parts[0] if len(relative.parts) > 1 else path.resolve().stem
            task = os.fsencode(task).decode("utf-8", "replace")  # it is shown and written
            files.append((str(relative), task, text))
    if other:
        print(f"--data: {len(other)} files passed over, such as {other[0]}: not readable as UTF-8")
    total = sum(len(text) for _, _, text in files)
    documents = []
    for name, task, text in files:
        if len(text) <= total / 20:
            documents.append(Document(name, name, text, task))
            continue
        parts, size = [[]], 0
        for line in text.splitlines(keepends=True):
            if size >= total / 100:
                parts.append([])
                size = 0
            parts[-1].append(line)
            size += len(line)
        for lines in parts:
            group = f"{name}#{len(documents)}"
            documents.append(Document(group, group, "".join(lines), task))
    return documents


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def is_binary(path: Path) -> bool:
    """Whether a file is no text in any encoding: it has NUL bytes, and they are not UTF-16's."""
    try:
        with open(path, "rb") as file:
            begin = file.read(8192)
    except OSError:  # it may be text: nobody here can tell
        return False
    return b"\0" in begin and not begin.startswith((b"\xff\xfe", b"\xfe\xff"))


def split_of(group: str) -> str:
    """train, valid or test, by a hash of the name: the same on every machine and for ever."""
    bucket = int(digest(SALT + group), 16) % 100
    return "train" if bucket < 90 else "valid" if bucket < 95 else "test"


def by_hash(documents: list[Document]) -> dict[str, list[Document]]:
    splits = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of(document.group)].append(document)
    return splits


def by_shares(documents: list[Document]) -> dict[str, list[Document]]:
    """The first documents by their hashes are for validation, the next for test: a twentieth each.

    What is longer than that is cut, wherever it may be: it holds a line as long.
    """
    total, parts = sum(len(document.text) for document in documents), []
    for document in documents:
        size = len(document.text) if len(document.text) <= total / 20 else -(-total // 100)
        for number, start in enumerate(range(0, len(document.text), size)):
            name = document.name if size == len(document.text) else f"{document.name}#{number}"
            text = document.text[start : start + size]
            parts.append(Document(name, name, text, document.task))
    splits, waiting = {split: [] for split in SPLITS}, sorted(parts, key=lambda d: digest(d.name))
    for split in ("valid", "test"):
        size = 0  # up to the document whose middle is beyond the mark
        while waiting and size + len(waiting[0].text) / 2 <= total / 20:
            splits[split].append(waiting.pop(0))
            size += len(splits[split][-1].text)
    splits["train"] = waiting
    return splits


def sizes(splits: dict[str, list[Document]]) -> dict[str, int]:
    """Characters of each part."""
    return {split: sum(len(d.text) for d in members) for split, members in splits.items()}


def load_documents(paths: list[str] | None, packages=()) -> dict[str, list[Document]]:
    """Each split's documents: from `paths`, else from the standard library and `packages`."""
    documents = read_paths(paths) if paths else standard_library() + installed_packages(packages)
    documents = [document for document in documents if document.text.strip()]
    splits = by_hash(documents)
    if paths and min(sizes(splits).values()) < LEAST:
        splits = by_shares(documents)
    size, split = min((size, split) for split, size in sizes(splits).items())
    if size < LEAST:
        source = " ".join(paths) if paths else "the standard library"
        raise UserError(
            f"{source}: {size} characters of text in the {split} part, at least {LEAST} are "
            f"needed: give more text (200 kB or more in all)"
        )
    return splits


def describe(splits: dict[str, list[Document]], paths: list[str] | None, packages=()) -> dict:
    """A text's facts for a result: sizes, a hash of the split, Python's version."""
    total = hashlib.sha256()
    for split in SPLITS:
        for document in splits[split]:
            name = f"{split} {document.name} {len(document.text)}"
            total.update(name.encode("utf-8", "surrogateescape"))
            total.update(document.text.encode())
    return {
        "source": " ".join(paths) if paths else ", ".join(["the standard library", *packages]),
        "python": sys.version.split()[0],
        "bytes": {s: sum(len(d.text.encode()) for d in splits[s]) for s in SPLITS},
        "hash": total.hexdigest()[:16],
    }


# -------------------------------------------------------------------------------- as tokens


def windows(tokens: Tensor, length: int) -> Tensor:
    """(N,) tokens -> (N // length, length): consecutive windows, the rest at the end dropped."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def overlap(train: Tensor, test: Tensor, n: int = 32) -> float:
    """The share of the test text's n-grams of tokens with a copy in the training text."""

    def hashes(tokens: Tensor) -> np.ndarray:
        values = tokens.numpy().astype(np.uint64)
        total = np.zeros(max(0, len(values) - n + 1), dtype=np.uint64)
        for offset in range(n):  # a polynomial hash, modulo 2^64
            total = total * np.uint64(6364136223846793005) + values[offset : offset + len(total)]
            total ^= total >> np.uint64(29)
        return total

    return float(np.isin(hashes(test), hashes(train)).mean())


class Text:
    """A run's text in tokens: its parts `splits`, cut into windows on demand."""

    def __init__(self, paths: list[str] | None, packages: tuple[str, ...], splits: tuple[str, ...]):
        self.documents, self.given = load_documents(paths, packages), bool(paths)
        self.description = describe(self.documents, paths, packages)
        self.splits, self.tokenizer = splits, None

    def expect(self, known: str) -> None:
        """Compare with `known`, the hash of the text that a target was trained on.

        The standard library of another Python differs a little. Its split goes by module names and
        is the same: that is told. Raises UserError for any other text, whose split is unknown.
        """
        if self.description["hash"] == known:
            return
        if self.given:
            raise UserError(
                "the text has changed since the target was trained: its split is unknown"
            )
        ours = self.description["python"]
        print(f"text: the target learnt from other versions than those here ({ours}); same split")

    def use(self, tokenizer: dict) -> None:
        """Tokenize with `tokenizer`, as `bpe.learn_tokenizer` gave it or a checkpoint kept it."""
        self.tokenizer, self.encoding = tokenizer, build_encoding(tokenizer)
        self.tokens = {split: self.tokenized(split) for split in self.splits}
        self.byte_counts = token_bytes(self.encoding)

    def tokenized(self, split: str) -> Tensor:
        return tokenize(self.encoding, [document.text for document in self.documents[split]])

    def windows(self, split: str, length: int) -> Tensor:
        """(N, length) consecutive windows of a split. Raises UserError if there is not one."""
        rows = windows(self.tokens[split], length)
        if len(rows) == 0:
            raise UserError(
                f"the {split} text has {len(self.tokens[split])} tokens, less than one window of "
                f"{length}: give more text, or shorter windows (--target_context, --head_window)"
            )
        return rows

    def overlap(self) -> float:
        """The share of the test text's 32-grams with a copy in training: near-copies flatter."""
        return overlap(self.tokens["train"], self.tokenized("test"))


def packages_for(vocab_size: int) -> tuple[str, ...]:
    """The installed packages with a part in the default text.

    A large vocabulary has a large model behind it: it needs more text than the standard library.
    """
    return ("torch", "numpy", "matplotlib") if vocab_size >= 8192 else ()


def read_text(paths: list[str] | None, packages: tuple[str, ...]) -> Text:
    """The text to train on, its training and validation parts; a line on the screen about it."""
    text = Text(paths, packages, ("train", "valid"))
    about = text.description
    sizes = ", ".join(f"{split} {size:,}" for split, size in about["bytes"].items())
    source = f"{about['source']} (Python {about['python']})"
    print(f"text: {source}, split {about['hash']}, bytes {sizes}")
    return text
