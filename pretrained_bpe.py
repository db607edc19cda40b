"""A pretrained model's tokenizer, as tiktoken understands it.

Byte-level BPE as in GPT-2: a pattern cuts text into pieces, a piece is a row of bytes, and of the
neighbours in it the pair with the lowest rank is joined first, until no pair has a rank. tiktoken
does just that, if it is given the pattern and the ranks. In the files of other libraries the ranks
are the order of a list of merges; where that is also the order of the tokens' numbers, as it is
wherever a tokenizer was learnt and not edited, the numbers will do.
"""

from typing import NamedTuple

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
SPLITS = (("Isolated", False), ("Removed", True))  # behavior and invert of what a pattern finds
PATTERNS = {"gpt-2": GPT2, "smollm": DIGITS, "llama-bpe": LLAMA3}


class Tokenizer(NamedTuple):
    """What either format says of a tokenizer."""

    vocabulary: list[str | None]  # tokens by number, in GPT-2's byte characters; None: unused
    merges: list[tuple[str, str]]
    special: dict[str, int]  # tokens that no text is cut into
    pattern: str
    begin: int | None  # the token that the model expects before any text
    end: int  # the one after which there is no more text
    bos: str  # what its chat template calls bos_token
    eos: str  # and eos_token


def byte_level_bpe(tokenizer: Tokenizer) -> dict:
    """The tokenizer as plain values, for `data.build_encoding`.

    Raises UserError where numbers and merges differ in order.
    """
    vocabulary, special = tokenizer.vocabulary, dict(tokenizer.special)
    # GPT-2 writes bytes as characters: printable ones as they are, the others from 256 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    number = {token: i for i, token in enumerate(vocabulary)}
    joined = [number["".join(merge)] for merge in tokenizer.merges]
    if joined != sorted(joined):
        raise UserError("its tokenizer's merges are not in the order of its tokens' numbers")
    tokens = []
    for i, token in enumerate(vocabulary):
        if token is None:  # a row of the embedding that no token uses
            token = f"<|unused {i}|>"
            special[token] = i
        plain = token if token in special else bytes(byte_of[c] for c in token).decode("latin-1")
        tokens.append(plain)
    special.setdefault(END_OF_TEXT, tokenizer.end)
    values = {"name": "bpe", "pattern": tokenizer.pattern, "tokens": tokens, "special": special}
    return values if tokenizer.begin is None else values | {"begin": tokenizer.begin}


# ---------------------------------------------------------------------------------------- GGUF


def tokenizer_in_gguf(about: dict) -> Tokenizer:
    """That of a GGUF file, whose fields are `about`. Raises UserError for one that is not read."""
    about = {k.removeprefix("tokenizer.ggml."): v for k, v in about.items()}
    model, cut = about["model"], about.get("pre")
    if model != "gpt2":
        kind = {"llama": "SentencePiece"}.get(model, model)
        raise UserError(f"its tokenizer is {kind}, only byte-level BPE can be read")
    if cut not in PATTERNS:
        raise UserError(f"its tokenizer cuts text by {cut}, known are {', '.join(PATTERNS)}")
    tokens, bos, eos = about["tokens"], about["bos_token_id"], about["eos_token_id"]
    ordinary = [kind == 1 for kind in about["token_type"]]
    return Tokenizer(
        tokens,
        [tuple(merge.split(" ")) for merge in about["merges"]],
        {token: i for i, token in enumerate(tokens) if not ordinary[i]},
        PATTERNS[cut],
        # Where the file does not say, llama.cpp begins the texts of Llama 3 so, and no others.
        bos if about.get("add_bos_token", cut == "llama-bpe") else None,
        eos,
        tokens[bos],
        tokens[eos],
    )


# ------------------------------------------------------------------------------ tokenizer.json


def tokenizer_in_json(file: dict, about: dict, model: dict) -> Tokenizer:
    """That of a tokenizer.json, with what tokenizer_config.json and config.json say.

    Raises UserError for one that is not read.
    """
    bpe = file["model"]
    if bpe["type"] != "BPE" or file.get("normalizer") or bpe.get("byte_fallback"):
        raise UserError("its tokenizer is no byte-level BPE (SentencePiece?), which cannot be read")
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    # What was added later on, the model may have no row for.
    special = {token: i for token, i in special.items() if i < model["vocab_size"]}
    ids = {i: token for token, i in (bpe["vocab"] | special).items()}
    end = model["eos_token_id"]
    end = end[0] if isinstance(end, list) else end

    def named(name: str, default: str) -> str:
        token = about.get(name) or default
        return token["content"] if isinstance(token, dict) else token

    return Tokenizer(
        [ids.get(i) for i in range(model["vocab_size"])],
        [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]],
        special,
        pattern_of(file["pre_tokenizer"]),
        special.get(begin_of(file.get("post_processor") or {})),
        end,
        named("bos_token", ""),
        named("eos_token", ids[end]),
    )


def pattern_of(pre_tokenizer: dict) -> str:
    """The pattern of a tokenizer.json. Raises UserError for one that is not known."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        first, by_gpt2 = steps[0], steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and by_gpt2:
            return DIGITS
        # The pieces are what the pattern finds, or all that lies between what it does not.
        split = first.get("behavior"), first.get("invert", False)
        if kinds == ["Split", "ByteLevel"] and split in SPLITS and not by_gpt2:
            return first["pattern"]["Regex"]
    raise UserError(f"its tokenizer cuts text by {' and '.join(kinds)}, which is not known here")


def begin_of(post_processor: dict) -> str | None:
    """The token that a tokenizer.json puts before any text, as Llama 3's does; None: it does not."""
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None
