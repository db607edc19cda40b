"""The tokenizer: byte-level byte-pair encoding (BPE, arXiv 1508.07909), learnt from the text.

It starts from the 256 bytes. Again and again it turns the most frequent pair of neighbours into a
new token: see `learn_merges`. The result is wrapped as a `tiktoken.Encoding`. tiktoken does all
encoding and decoding, also for pretrained tokenizers (tokenizers.py).
"""

import re
from collections import Counter, defaultdict
from contextlib import contextmanager

import numpy as np
import tiktoken
import torch

from plumbing.cli import UserError

END_OF_TEXT = "<|endoftext|>"
# The pieces of a text; a merge stays inside one. They are a line break with the indentation after
# it, a word with the space or underscores before it, up to three digits, punctuation, blanks. The
# last branch matches any character, so no character is ever dropped. Both Python's re and
# tiktoken's engine read this pattern.
PIECES = r"\n+[ \t]*| ?_*[^\W\d_]+| ?\d{1,3}| ?[^\s\w]+|_+|[^\S\n]+|[\s\S]"


def learn_merges(texts, vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding: token bytes -> rank, the 256 bytes first, then one entry a merge.

    Counts are kept for each distinct piece. A merge revisits only the pieces with its pair. The
    pair itself breaks ties between counts, so the same text always gives the same tokens.
    """
    pieces = Counter(piece for text in texts for piece in re.findall(PIECES, text))
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
    """The `tiktoken.Encoding` for `learn_tokenizer`'s values, or for a name known to tiktoken."""
    if tokenizer["name"] != "bpe":
        try:
            encoding = tiktoken.get_encoding(tokenizer["name"])
        except Exception as error:  # tiktoken fetches its own encodings: no network, no encoding
            fault = f"cannot be loaded: {' '.join(str(error).split())[:100]}"
            raise UserError(f"tiktoken's encoding {tokenizer['name']} {fault}") from error
        encoding.known, encoding.begin, encoding.added = encoding.n_vocab, [], frozenset()
        encoding.stops = frozenset({encoding.eot_token})
        return encoding
    tokens, added = tokenizer["tokens"], tokenizer.get("added", {})
    special = tokenizer.get("special", {END_OF_TEXT: len(tokens)}) | added
    numbers = set(range(len(tokens))).difference(special.values())
    ranks = {tokens[number].encode("latin-1"): number for number in numbers}
    # A pretrained tokenizer may lack some bytes: its training text never had them. tiktoken needs
    # all 256. The missing ones get numbers unknown to the target, and `encode` leaves them out.
    known = max(len(tokens), 1 + max(special.values()))
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    ranks |= {byte: known + i for i, byte in enumerate(missing)}
    rules = dict(pat_str=tokenizer["pattern"], mergeable_ranks=ranks, special_tokens=special)
    encoding = tiktoken.Encoding("koala-bpe", **rules)
    encoding.known, encoding.added = known, frozenset(added)
    encoding.stops = frozenset({encoding.eot_token, *tokenizer.get("ends", ())})
    encoding.begin = [tokenizer["begin"]] if "begin" in tokenizer else []
    return encoding


@contextmanager
def within_its_limits():
    """tiktoken panics on a run of about a million blanks: a UserError, as for any other text."""
    try:
        yield
    except BaseException as error:  # its own kind, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        reason = "a run of alike characters is too long for it"
        raise UserError(f"this text cannot be cut into tokens: {reason}") from error


def encode(encoding: tiktoken.Encoding, text: str | bytes) -> list[int]:
    """Tokens of any text or bytes: their `decode_bytes` gives the same bytes back.

    One exception: a pretrained tokenizer may have no token for a byte, which is then left out.
    Bytes outside UTF-8 become single-byte tokens. A string carries them by Python's
    `surrogateescape`, as command lines and file names do.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    tokens, found = [], dict(allowed_special=encoding.added, disallowed_special=())
    for index, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
        if index % 2 == 0:
            with within_its_limits():  # tokens that were added are looked for in any text
                tokens += encoding.encode(part, **found)
        else:
            raw = part.encode("utf-8", "surrogateescape")
            tokens += [encoding.encode_single_token(bytes([byte])) for byte in raw]
    return [token for token in tokens if token < encoding.known]


def encode_prompt(encoding: tiktoken.Encoding, text: str | bytes) -> list[int]:
    """Tokens of a text from its beginning on: Llama 3 needs a special token there."""
    tokens = encode(encoding, text)
    return encoding.begin + tokens if tokens else tokens  # an empty prompt stays empty


def tokenize(encoding: tiktoken.Encoding, texts: list[str]) -> torch.Tensor:
    """All texts in one row of tokens (N,), END_OF_TEXT after each."""
    with within_its_limits():
        found = dict(allowed_special=encoding.added, disallowed_special=())
        rows = encoding.encode_batch(texts, **found)
    flat = np.concatenate([np.asarray(row + [encoding.eot_token], np.int32) for row in rows])
    return torch.from_numpy(flat[flat < encoding.known])  # as in `encode`


def token_bytes(encoding: tiktoken.Encoding) -> torch.Tensor:
    """Each token's length in bytes of text (V,); END_OF_TEXT stands for none."""
    tokens = range(encoding.n_vocab)
    lengths = torch.tensor([len(encoding.decode_single_token_bytes(token)) for token in tokens])
    lengths[encoding.eot_token] = 0
    return lengths
