"""The text, and the tokens it becomes.

A language model needs text. Every machine that can run this project already has some: the source
code of Python's own standard library, about ten megabytes of code, docstrings and, in
`pydoc_data.topics`, the prose of the language reference. `--data` takes any other UTF-8 text.

**Split.** Train 90 %, validation 5 %, test 5 %, decided by a hash of each document's *group* (the
top-level module), so that two files of one package never stand on both sides. Every choice is made
on validation; the test part serves bench.py alone. Text that occurs on both sides makes every
number look better than it is, so `overlap` measures how much of the test part does.

**Tokenizer.** Byte-level byte-pair encoding (BPE, arXiv 1508.07909): start from the 256 bytes and,
again and again, turn the most frequent pair of neighbours into a new token. `learn_merges` is the
whole of it. The result is wrapped as a `tiktoken.Encoding`, which does all encoding and decoding.

Read next: model.py.
"""

import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from cli import UserError

END_OF_TEXT = "<|endoftext|>"
# Pieces that no merge may cross: a line break with the indentation after it, a word with the space
# or underscores before it, up to three digits, punctuation, blanks. The last branch matches any
# character, so that nothing is ever dropped. Python's re and tiktoken's engine both read it.
PIECES = r"\n+[ \t]*| ?_*[^\W\d_]+| ?\d{1,3}| ?[^\s\w]+|_+|[^\S\n]+|[\s\S]"
SPLITS = ("train", "valid", "test")
# Mixed into the hash that splits: modules differ so much in size that most salts miss 90/5/5 by
# far. This one was picked on Python 3.11 for its shares of bytes, before any model was trained.
SALT = "koala 871 "
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings"}


@dataclass(frozen=True)
class Document:
    """One text. `group` decides its split; `task` is "" where the text itself tells it (Python)."""

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
            continue  # a few files are kept in another encoding on purpose
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
    """UTF-8 files, and folders of them. A folder's files that are no text are passed over.

    The task is the top-level folder. Data in few files would leave a split empty: a file of more
    than a twentieth of the data is cut at line ends into parts of about 1 %, each its own group.
    """
    files = []
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
                    continue
                raise UserError(f"--data: {file} cannot be read as UTF-8 text: {error}") from error
            task = relative.parts[0] if len(relative.parts) > 1 else path.resolve().stem
            files.append((str(relative), task, text))
    total = sum(len(text) for _, _, text in files)
    documents = []
    for name, task, text in files:
        if len(text) <= total / 20:
            documents.append(Document(name, name, text, task))
            continue
        part, size = [], 0
        for line in text.splitlines(keepends=True):
            part.append(line)
            size += len(line)
            if size >= total / 100:
                group = f"{name}#{len(documents)}"
                documents.append(Document(group, group, "".join(part), task))
                part, size = [], 0
        if part:
            group = f"{name}#{len(documents)}"
            documents.append(Document(group, group, "".join(part), task))
    return documents


def split_of(group: str) -> str:
    """train, valid or test, by a hash of the name: the same on every machine and for ever."""
    bucket = int(hashlib.sha256((SALT + group).encode()).hexdigest(), 16) % 100
    return "train" if bucket < 90 else "valid" if bucket < 95 else "test"


def load_documents(paths: list[str] | None, packages=()) -> dict[str, list[Document]]:
    """The documents of each split: of `paths`, else of the standard library and `packages`."""
    documents = read_paths(paths) if paths else standard_library() + installed_packages(packages)
    splits = {split: [] for split in SPLITS}
    for document in documents:
        if document.text.strip():
            splits[split_of(document.group)].append(document)
    source = " ".join(paths) if paths else "the standard library"
    for split, members in splits.items():
        size = sum(len(d.text) for d in members)
        if size < 5000:
            raise UserError(
                f"{source}: {size} characters of text in the {split} part, at least 5000 are "
                f"needed: give more text (200 kB or more in all)"
            )
    return splits


def describe(splits: dict[str, list[Document]], paths: list[str] | None, packages=()) -> dict:
    """What a result has to state about its text: sizes, a hash of the split, Python's version."""
    source = ", ".join(["the standard library", *packages])
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in splits[split]:
            digest.update(f"{split} {document.name} {len(document.text)}".encode())
            digest.update(document.text.encode())
    return {
        "source": " ".join(paths) if paths else source,
        "python": sys.version.split()[0],
        "bytes": {s: sum(len(d.text.encode()) for d in splits[s]) for s in SPLITS},
        "hash": digest.hexdigest()[:16],
    }


# ------------------------------------------------------------------------------------ tokenizer


def learn_merges(texts, vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding: token bytes -> rank, the 256 bytes first, then one entry a merge.

    Counts are kept per distinct piece, and a merge revisits only the pieces that hold its pair.
    Equal counts are broken by the pair itself, so that the same text always gives the same tokens.
    """
    pieces = Counter()
    for text in texts:
        pieces.update(re.findall(PIECES, text))
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in piece.encode()] for piece in pieces]
    weights = list(pieces.values())
    count, where = Counter(), defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += weights[index]
            where[pair].add(index)
    while len(ranks) < vocab_size and count:
        best = max(count, key=lambda pair: (count[pair], pair))
        if count[best] < 2:
            break  # nothing repeats any more
        merged = best[0] + best[1]
        ranks.setdefault(merged, len(ranks))  # two pairs can spell the same token
        for index in where.pop(best):
            word, joined = words[index], []
            for token in word:  # join the pair wherever it stands, from the left
                if joined and joined[-1] == best[0] and token == best[1]:
                    joined[-1] = merged
                else:
                    joined.append(token)
            for pair in zip(word, word[1:]):
                count[pair] -= weights[index]
            for pair in zip(joined, joined[1:]):
                count[pair] += weights[index]
                where[pair].add(index)
            words[index] = joined
        del count[best]
        count = +count if len(ranks) % 256 == 0 else count  # drop the pairs that ran out
    return ranks


def learn_tokenizer(texts, vocab_size: int) -> dict:
    """Learn `vocab_size` tokens, the last of them END_OF_TEXT, as plain values for a checkpoint."""
    ranks = learn_merges(texts, vocab_size - 1)
    tokens = [token.decode("latin-1") for token in sorted(ranks, key=ranks.get)]
    return {"name": "bpe", "pattern": PIECES, "tokens": tokens}


def build_encoding(tokenizer: dict) -> tiktoken.Encoding:
    """The `tiktoken.Encoding` of what `learn_tokenizer` gave, or of a name tiktoken knows."""
    if tokenizer["name"] != "bpe":
        try:
            encoding = tiktoken.get_encoding(tokenizer["name"])
        except Exception as error:  # tiktoken fetches its own encodings: no network, no encoding
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"--tokenizer {tokenizer['name']} is not to be had: {reason}"
            ) from error
        encoding.known, encoding.begin = encoding.n_vocab, []
        return encoding
    tokens = tokenizer["tokens"]
    special = tokenizer.get("special", {END_OF_TEXT: len(tokens)})
    numbers = set(range(len(tokens))).difference(special.values())
    ranks = {tokens[number].encode("latin-1"): number for number in numbers}
    # A pretrained tokenizer may lack bytes that its training text never had. tiktoken needs them
    # all: these get numbers beyond those known to the target, and `encode` leaves them out.
    known = max(len(tokens), 1 + max(special.values()))
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    ranks |= {byte: known + i for i, byte in enumerate(missing)}
    encoding = tiktoken.Encoding(
        "koala-bpe", pat_str=tokenizer["pattern"], mergeable_ranks=ranks, special_tokens=special
    )
    encoding.known = known
    encoding.begin = [tokenizer["begin"]] if "begin" in tokenizer else []
    return encoding


def encode(encoding: tiktoken.Encoding, text: str | bytes) -> list[int]:
    """Tokens of any text or bytes: `decode_bytes` of them gives the same bytes back.

    (But for bytes that a pretrained tokenizer has no token for: they are left out.)

    Bytes that are no UTF-8 become single-byte tokens. In a string they are what Python's
    `surrogateescape` makes of them, which is how a command line and a file name carry them.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    tokens = []
    for index, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
        if index % 2 == 0:
            tokens += encoding.encode_ordinary(part)
        else:
            raw = part.encode("utf-8", "surrogateescape")
            tokens += [encoding.encode_single_token(bytes([byte])) for byte in raw]
    return [token for token in tokens if token < encoding.known]


def encode_prompt(encoding: tiktoken.Encoding, text: str | bytes) -> list[int]:
    """Tokens of a text that nothing comes before: Llama 3 wants a special token there."""
    tokens = encode(encoding, text)
    return encoding.begin + tokens if tokens else tokens  # an empty prompt stays one


def tokenize(encoding: tiktoken.Encoding, documents: list[Document]) -> torch.Tensor:
    """All documents in one row of tokens (N,), END_OF_TEXT after each."""
    rows = encoding.encode_ordinary_batch([document.text for document in documents])
    flat = [np.asarray(row + [encoding.eot_token], dtype=np.int32) for row in rows]
    flat = np.concatenate(flat)
    return torch.from_numpy(flat[flat < encoding.known])  # as in `encode`


def token_bytes(encoding: tiktoken.Encoding) -> torch.Tensor:
    """How many bytes of text each token stands for (V,); END_OF_TEXT stands for none."""
    lengths = [0] * encoding.n_vocab
    for token in range(encoding.n_vocab):
        if token != encoding.eot_token:
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    return torch.tensor(lengths)


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """(N,) tokens -> (N // length, length): consecutive windows, the rest at the end dropped."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def overlap(train: torch.Tensor, test: torch.Tensor, n: int = 32) -> float:
    """The share of the test text's n-grams of tokens that occur in the training text."""

    def hashes(tokens: torch.Tensor) -> np.ndarray:
        values = tokens.numpy().astype(np.uint64)
        total = np.zeros(max(0, len(values) - n + 1), dtype=np.uint64)
        for offset in range(n):  # a polynomial hash, modulo 2^64
            total = total * np.uint64(6364136223846793005) + values[offset : offset + len(total)]
            total ^= total >> np.uint64(29)
        return total

    return float(np.isin(hashes(test), hashes(train)).mean())
