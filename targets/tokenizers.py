"""A pretrained model's tokenizer, as tiktoken understands it.

Byte-level BPE as in GPT-2: a pattern cuts text into pieces, and a piece is a row of bytes. The pair
of neighbours with the lowest rank is joined first, and so on until no pair has a rank. tiktoken
does exactly this by a pattern and ranks.

Other libraries store a list of merges, and its order gives the ranks. In a tokenizer that was
learnt and never edited, the tokens' numbers have the same order. Then they serve as ranks. Any
other tokenizer is refused.
"""

from typing import NamedTuple

from plumbing.cli import UserError
from targets.bpe import END_OF_TEXT

# Patterns that cut a text before merging. PATTERNS has them by their names in GGUF.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut off one by one, then GPT2 applies to the rest. So blanks before a digit are blanks
# at the end of a piece, and stay together.
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = (("Isolated", False), ("Removed", True))  # behavior and invert of a pattern's pieces
PATTERNS = {"gpt-2": GPT2, "smollm": DIGITS, "llama-bpe": LLAMA3}


class Tokenizer(NamedTuple):
    """A tokenizer, as either format describes it."""

    vocabulary: list[str | None]  # tokens by number, in GPT-2's byte characters; None: unused
    merges: list[tuple[str, str]]
    special: dict[str, int]  # tokens that no text is cut into
    pattern: str
    begin: int | None  # the token that the model expects before any text
    end: int  # the token after the end of a text
    bos: str  # bos_token in its chat template
    eos: str  # eos_token in its chat template


def byte_level_bpe(tokenizer: Tokenizer) -> dict:
    """The tokenizer as plain values, for `bpe.build_encoding`.

    Raises UserError where numbers and merges differ in order.
    """
    vocabulary, special = tokenizer.vocabulary, dict(tokenizer.special)
    # GPT-2 writes each byte as a character: printable ones as they are, the others from 256 on.
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
        if token not in special:
            token = bytes(byte_of[c] for c in token).decode("latin-1")
        tokens.append(token)
    special.setdefault(END_OF_TEXT, tokenizer.end)
    values = {"name": "bpe", "pattern": tokenizer.pattern, "tokens": tokens, "special": special}
    return values if tokenizer.begin is None else values | {"begin": tokenizer.begin}


# ---------------------------------------------------------------------------------------- GGUF


def tokenizer_in_gguf(about: dict) -> Tokenizer:
    """The tokenizer of a GGUF file; `about`: its fields. Raises UserError for an unknown kind."""
    about = {k.removeprefix("tokenizer.ggml."): v for k, v in about.items()}
    model, cut = about["model"], about.get("pre")
    if model != "gpt2":
        kind = {"llama": "SentencePiece"}.get(model, model)
        raise UserError(f"its tokenizer is {kind}, only byte-level BPE can be read")
    if cut not in PATTERNS:
        raise UserError(f"its tokenizer cuts text by {cut}, known are {', '.join(PATTERNS)}")
    tokens, bos, eos = about["tokens"], about["bos_token_id"], about["eos_token_id"]
    ordinary = [kind == 1 for kind in about["token_type"]]
    merges = [tuple(merge.split(" ")) for merge in about["merges"]]
    special = {token: i for i, token in enumerate(tokens) if not ordinary[i]}
    # Where the file is silent, llama.cpp puts this token before the texts of Llama 3 alone.
    begin = bos if about.get("add_bos_token", cut == "llama-bpe") else None
    return Tokenizer(tokens, merges, special, PATTERNS[cut], begin, eos, tokens[bos], tokens[eos])


# ------------------------------------------------------------------------------ tokenizer.json


def tokenizer_in_json(file: dict, about: dict, model: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.json: `file`. Raises UserError for an unknown kind.

    `about` comes from tokenizer_config.json, `model` from config.json.
    """
    bpe = file["model"]
    if bpe["type"] != "BPE" or file.get("normalizer") or bpe.get("byte_fallback"):
        raise UserError("its tokenizer is no byte-level BPE (SentencePiece?), which cannot be read")
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    # The model may have no row for a token that was added later.
    special = {token: i for token, i in special.items() if i < model["vocab_size"]}
    ids = {i: token for token, i in (bpe["vocab"] | special).items()}
    end = model["eos_token_id"]
    end = end[0] if isinstance(end, list) else end

    def named(name: str, default: str) -> str:
        token = about.get(name) or default
        return token["content"] if isinstance(token, dict) else token

    vocabulary = [ids.get(i) for i in range(model["vocab_size"])]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
    pattern = pattern_of(file["pre_tokenizer"])
    begin = special.get(begin_of(file.get("post_processor") or {}))
    bos, eos = named("bos_token", ""), named("eos_token", ids[end])
    return Tokenizer(vocabulary, merges, special, pattern, begin, end, bos, eos)


def pattern_of(pre_tokenizer: dict) -> str:
    """The pattern of a tokenizer.json. Raises UserError for an unknown one."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        first, by_gpt2 = steps[0], steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and by_gpt2:
            return DIGITS
        # The pieces are the pattern's matches, or all text between its non-matches.
        split = first.get("behavior"), first.get("invert", False)
        if kinds == ["Split", "ByteLevel"] and split in CUTS and not by_gpt2:
            return first["pattern"]["Regex"]
    raise UserError(f"its tokenizer cuts text by {' and '.join(kinds)}, which is not known here")


def begin_of(post_processor: dict) -> str | None:
    """The token before any text in a tokenizer.json, as in Llama 3's; None: there is none."""
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None
