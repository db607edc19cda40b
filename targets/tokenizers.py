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
ORDINARY, ADDED = 1, 4  # types of tokens in GGUF
CUTS = (("Isolated", False), ("Removed", True))  # behavior and invert of a pattern's pieces
PATTERNS = {"gpt-2": GPT2, "smollm": DIGITS}
PATTERNS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3)


class Tokenizer(NamedTuple):
    """A tokenizer, as either format describes it."""

    vocabulary: list[str | None]  # tokens by number, in GPT-2's byte characters; None: unused
    merges: list[tuple[str, str]]
    special: dict[str, int]  # tokens that no text is cut into
    added: dict[str, int]  # tokens that are looked for in any text, before it is cut
    whole: bool  # whether a piece that is a token becomes it, also where no merges lead there
    pattern: str
    begin: int | None  # the token that the model expects before any text
    ends: list[int]  # the tokens after the end of a text
    bos: str  # bos_token in its chat template
    eos: str  # eos_token in its chat template


def byte_level_bpe(tokenizer: Tokenizer) -> dict:
    """The tokenizer as plain values, for `bpe.build_encoding`.

    Raises UserError where tiktoken would cut a text into other tokens.
    """
    vocabulary, special = tokenizer.vocabulary, dict(tokenizer.special)
    added, ends = tokenizer.added, tokenizer.ends
    for token in added:
        for other in special | added:  # whichever is the longer: tiktoken finds either first
            if other != token and (other.startswith(token) or token.startswith(other)):
                raise UserError(f"its added token {token!r} and {other!r} begin alike")
    # GPT-2 writes each byte as a character: printable ones as they are, the others from 256 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    number = {token: i for i, token in enumerate(vocabulary)}
    joined = [number["".join(merge)] for merge in tokenizer.merges]
    if joined != sorted(joined):
        raise UserError("its tokenizer's merges are not in the order of its tokens' numbers")
    ordinary = [t for t in vocabulary if t is not None and t not in special and t not in added]
    if not tokenizer.whole and (lost := unreachable(ordinary, tokenizer.merges)):
        raise UserError(f"no merges lead to its token {lost!r}, which tiktoken would use")
    tokens = []
    for i, token in enumerate(vocabulary):
        if token is None:  # a row of the embedding that no token uses
            token = f"<|unused {i}|>"
            special[token] = i
        if token not in special and token not in added:
            token = bytes(byte_of[c] for c in token).decode("latin-1")
        tokens.append(token)
    special.setdefault(END_OF_TEXT, ends[0])
    values = {"name": "bpe", "pattern": tokenizer.pattern, "tokens": tokens, "special": special}
    values["ends"] = ends  # a turn may end by another token than a text does
    values |= {"added": dict(added)} if added else {}
    return values if tokenizer.begin is None else values | {"begin": tokenizer.begin}


def unreachable(tokens: list[str], merges: list[tuple[str, str]]) -> str | None:
    """The first token that is not what its own characters are merged to; None: there is none."""
    ranks = {merge: rank for rank, merge in reversed([*enumerate(merges)])}
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            pairs = [ranks.get(pair, len(merges)) for pair in zip(parts, parts[1:])]
            best = min(pairs)
            if best == len(merges):
                return token
            i = pairs.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return None


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
    tokens, kinds = about["tokens"], about["token_type"]
    ends = [
        about[f"{name}_token_id"] for name in ("eos", "eot", "eom") if f"{name}_token_id" in about
    ]
    if not ends:
        raise UserError("it names no token for the end of a text (tokenizer.ggml.eos_token_id)")
    bos, ends = about.get("bos_token_id"), list(dict.fromkeys(ends))
    merges = [tuple(merge.split(" ")) for merge in about["merges"]]
    special = {token: i for i, token in enumerate(tokens) if kinds[i] not in (ORDINARY, ADDED)}
    added = {token: i for i, token in enumerate(tokens) if kinds[i] == ADDED}
    # Where the file is silent, llama.cpp puts this token before the texts of Llama 3 alone.
    whole = PATTERNS[cut] == LLAMA3
    begin = bos if about.get("add_bos_token", whole) else None
    shown = "" if bos is None else tokens[bos], tokens[ends[0]]
    return Tokenizer(tokens, merges, special, added, whole, PATTERNS[cut], begin, ends, *shown)


# ------------------------------------------------------------------------------ tokenizer.json


def tokenizer_in_json(file: dict, about: dict, model: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.json: `file`. Raises UserError for an unknown kind.

    `about` comes from tokenizer_config.json, `model` from config.json, `eos_token_id` as a list.
    """
    bpe = file["model"]
    if bpe.get("type", "BPE") != "BPE" or file.get("normalizer") or bpe.get("byte_fallback"):
        raise UserError("its tokenizer is no byte-level BPE (SentencePiece?), which cannot be read")
    special, added = {}, {}
    for token in file.get("added_tokens", ()):
        if token["id"] >= model["vocab_size"]:
            continue  # the model has no row for a token that was added later
        wide = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
        if wide and not token.get("special"):
            raise UserError(f"its added token {token['content']!r} is found by {wide[0]}")
        (special if token.get("special") else added)[token["content"]] = token["id"]
    ids = {i: token for token, i in (bpe["vocab"] | special | added).items()}
    ends = model["eos_token_id"]
    if not ends and (named_end := about.get("eos_token")):
        content = named_end["content"] if isinstance(named_end, dict) else named_end
        ends = [i for i, token in ids.items() if token == content]
    if not ends:
        raise UserError("it names no token for the end of a text (eos_token_id)")

    def named(name: str, default: str) -> str:
        token = about.get(name) or default
        return token["content"] if isinstance(token, dict) else token

    vocabulary = [ids.get(i) for i in range(model["vocab_size"])]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
    pattern = pattern_of(file["pre_tokenizer"])
    begin = special.get(begin_of(file.get("post_processor") or {}))
    bos, eos = named("bos_token", ""), named("eos_token", ids[ends[0]])
    whole = bool(bpe.get("ignore_merges"))
    return Tokenizer(vocabulary, merges, special, added, whole, pattern, begin, ends, bos, eos)


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
