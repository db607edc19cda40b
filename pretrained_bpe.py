"""A pretrained model's tokenizer, as tiktoken understands it.

Byte-level BPE as in GPT-2: a pattern cuts text into pieces, a piece is a row of bytes, and of the
neighbours in it the pair with the lowest rank is joined first, until no pair has a rank. tiktoken
does just that, if it is given the pattern and the ranks. In the files of other libraries the ranks
are the order of a list of merges; where that is also the order of the tokens' numbers, as it is
wherever a tokenizer was learnt and not edited, the numbers will do.
"""

from cli import UserError
from data import END_OF_TEXT

# How a text is cut before merging, by the name that GGUF has for it.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut off one by one before that rule is applied to the rest: blanks before a digit are
# blanks at the end of a piece, and stay together.
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt-2": GPT2, "smollm": DIGITS, "llama-bpe": LLAMA3}


def byte_level_bpe(
    vocabulary: list[str | None],
    merges: list[tuple[str, str]],
    special: dict[str, int],
    pattern: str,
    end: int,
) -> dict:
    """The tokenizer as plain values, for `data.build_encoding`.

    vocabulary: tokens by number, in GPT-2's byte characters, None for a number that none has;
    special: those that no text is cut into; end: the number of the one that ends a text. Raises
    UserError where numbers and merges differ in order.
    """
    # GPT-2 writes bytes as characters: printable ones as they are, the others from 256 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    number = {token: i for i, token in enumerate(vocabulary)}
    joined = [number["".join(merge)] for merge in merges]
    if joined != sorted(joined):
        raise UserError("its tokenizer's merges are not in the order of its tokens' numbers")
    special, tokens = dict(special), []
    for i, token in enumerate(vocabulary):
        if token is None:  # a row of the embedding that no token uses
            token = f"<|unused {i}|>"
            special[token] = i
        plain = token if token in special else bytes(byte_of[c] for c in token).decode("latin-1")
        tokens.append(plain)
    special.setdefault(END_OF_TEXT, end)
    return {"name": "bpe", "pattern": pattern, "tokens": tokens, "special": special}


def pattern_of(pre_tokenizer: dict) -> str:
    """The pattern of a tokenizer.json. Raises UserError for one that is not known."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return DIGITS
        if kinds == ["Split", "ByteLevel"] and not steps[-1].get("use_regex", True):
            return steps[0]["pattern"]["Regex"]
    raise UserError(f"its tokenizer cuts text by {' and '.join(kinds)}, which is not known here")
