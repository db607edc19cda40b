"""The prompts that a benchmark decodes: passages of held-out text, or questions to a chat model.

Acceptance depends on the text, so results are given by task. A model of plain text continues
passages of the text kept for testing. Its tasks are `code` (function bodies), `docstring` (prose
inside code) and `docs` (reference prose). A chat model answers the questions of prompts.jsonl. No
head is ever trained on them. Source: Spec-Bench, arXiv 2401.07851.

`python -m study.prompts` writes the passages of a run to a file beside it, prompts.jsonl, those
marked whose greedy text is a loop: most of them, beside a small target. A benchmark of that run
takes its prompts from there, and decodes hardly a loop to find the others.
"""

import ast
import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import tiktoken

from plumbing.cli import UserError, option, parse, run
from plumbing.files import atomic_write
from speculate import check_prompt, generate
from targets.bpe import encode, encode_prompt
from targets.loading import WHICH_RUN, find_run, load, result_file
from targets.outputs import is_loop
from targets.runs import settings_of, trained_heads
from targets.text import Document, Text, packages_for

QUESTIONS = Path(__file__).with_name("prompts.jsonl")
PROMPT_TOKENS = 64
CANDIDATES = 1500  # prompts to look for, in all tasks together
MIN_PROMPTS = 5  # a task with fewer prompts is left out
MARKED = "prompts.jsonl"  # in a run's folder
MARKED_TOKENS = 128  # of a greedy text that is called a loop or not: bench.py's default

# --------------------------------------------------------------------- questions to a chat model


@dataclass(frozen=True)
class Question:
    """One conversation: the user's words, turn by turn. They do not depend on the answers."""

    category: str
    turns: list[str]
    split: str = "test"
    loop: bool = False  # whether its greedy text of MARKED_TOKENS is known to be one


class Prompt(NamedTuple):
    """Tokens to go on from, the number of the candidate they come from, and the target's text."""

    task: str
    tokens: list[int]
    conversation: int
    plain: list[int]


class Passage(NamedTuple):
    """A text to go on with, in tokens."""

    task: str
    tokens: list[int]
    loop: bool = False  # as above


def read_questions(path: Path) -> list[Question]:
    """The questions of a file with one JSON object a line, as in Spec-Bench and MT-bench.

    Raises UserError, naming the line, for an object without `turns`.
    """
    questions = []
    # Not splitlines: it would cut at characters that JSON may hold as they are.
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = row["turns"]
            texts = turns if isinstance(turns, list) else []
            category = row.get("category") or "file"
            if not isinstance(category, str):
                raise ValueError("its category is no text")
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("its turns are not texts")
            "".join([category, *texts]).encode()  # JSON may hold half a character: a surrogate
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, line {number} is no question: {reason}") from error
        split, loop = row.get("split", "test"), row.get("loop") is True
        questions.append(Question(category, texts, split, loop))
    return questions


# ------------------------------------------------------------------------ passages of a text


def passages(document: Document) -> list[tuple[str, str]]:
    """The (task, text) pieces of a document that a prompt can be cut from."""
    if document.task:  # prose: the first paragraph, then others at least 1,000 characters apart
        starts = [0]
        for match in re.finditer(r"\n\n(?=\S)", document.text):
            if match.end() >= starts[-1] + 1000:
                starts.append(match.end())
        return [(document.task, document.text[start : start + 1000]) for start in starts]
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return []
    lines, found = re.split(r"(?<=\n)", document.text), []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        prose = ast.get_docstring(node) if isinstance(node, documented) else None
        if prose:
            found.append(("docstring", prose))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if prose else node.body
            if body:
                found.append(("code", "".join(lines[body[0].lineno - 1 : node.end_lineno])))
    return found


def in_turn(candidates: list, kinds: list[str]) -> list:
    """The first candidate of each kind, then the second of each, ..: so a part has all kinds."""
    seen, places = Counter(), []
    for kind in kinds:
        seen[kind] += 1
        places.append(seen[kind])
    return [one for _, one in sorted(zip(places, candidates), key=lambda pair: pair[0])]


def from_documents(
    documents: list[Document], encoding: tiktoken.Encoding, count: int, length: int = PROMPT_TOKENS
) -> tuple[list[Passage], list[str]]:
    """About `count` prompts of `length` tokens, shared out evenly between the tasks, in turn.

    Returns (prompts, the tasks left out for want of prompts). A hash of its text
    decides whether a passage is taken: so the choice is fixed, yet spread widely.
    """
    found = defaultdict(dict)
    for document in documents:
        for task, text in passages(document):
            if len(text) >= length:  # a token is at least one byte
                order = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
                found[task][order] = text
    prompts, left_out = [], []
    for task, texts in sorted(found.items()):
        share = -(-count // len(found))  # rounded up
        pieces = (encode(encoding, texts[order])[:length] for order in sorted(texts))
        taken = list(islice((piece for piece in pieces if len(piece) == length), share))
        if len(taken) < min(MIN_PROMPTS, share):
            left_out.append(task)
        else:
            prompts += [Passage(task, tokens) for tokens in taken]
    return in_turn(prompts, [prompt.task for prompt in prompts]), left_out


# ------------------------------------------------------------------- the prompts of a benchmark


def held_out_text(trained: dict, split: str) -> Text | None:
    """One split of the text that a target was trained on; None for a target trained elsewhere.

    `trained`: the target's checkpoint, its weights are not needed. Raises UserError where text that
    was given has changed since.
    """
    settings, about = settings_of(Path("target.pt"), trained), trained["training"]
    if "data" not in about:
        return None
    text = Text(settings["data"], packages_for(settings["target_vocab"]), (split,))
    text.expect(about["data"]["hash"])
    text.use(trained["tokenizer"])
    return text


def from_file(path: Path) -> list[Question]:
    """The questions of a .jsonl file; of any other file each line, as a question."""
    try:
        if path.suffix.lower() in (".jsonl", ".json", ".ndjson", ".jsonlines"):
            return read_questions(path)
        lines = [line.rstrip("\r") for line in path.read_text("utf-8-sig").split("\n")]
        return [Question("file", [line]) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def load_prompts(config, folder: Path, target, text: Text | None, encoding) -> list:
    """Candidates, each a passage or a question: of --prompts_file, or of this --split.

    A chat model's split has the questions of this folder. Any other's has the passages in the run's
    `folder`, or of held-out text.
    """
    if config.prompts_file is not None:
        found = from_file(Path(config.prompts_file))
    elif target.chat is not None:
        found = [q for q in from_file(QUESTIONS) if q.split == config.split]
        found = in_turn(found, [q.category for q in found])
    elif (folder / MARKED).is_file():
        found = [q for q in from_file(folder / MARKED) if q.split == config.split]
    elif text is None:
        raise UserError("this target has no held-out text of its own: give --prompts_file")
    else:
        found, left_out = from_documents(text.documents[config.split], encoding, CANDIDATES)
        if left_out:
            print(f"left out for want of prompts: {', '.join(left_out)}")
    if target.chat is None:
        found = [as_passage(one, encoding) if isinstance(one, Question) else one for one in found]
    if not found:
        raise UserError("there is no prompt to measure with: give more text, or --prompts_file")
    return found


def as_passage(question: Question, encoding) -> Passage:
    """The first turn of a question as a text to go on with."""
    return Passage(question.category, encode_prompt(encoding, question.turns[0]), question.loop)


def check_prompts(config, target, depth: int, prompts: list) -> list[int]:
    """How many new tokens each prompt has room for.

    Raises UserError, before any time is spent, for a prompt without room for a whole cycle.
    """
    rooms, needed = [], depth + 2
    if config.max_new_tokens < needed:
        raise UserError(f"--max_new_tokens {config.max_new_tokens}: a cycle needs {needed}")
    for candidate in prompts:
        asked = isinstance(candidate, Question)
        try:
            prompt = target.chat.prompt(candidate.turns[:1]) if asked else candidate.tokens
            check_prompt(target.config, prompt)
            room = min(config.max_new_tokens, target.config.context - len(prompt))
            if room < needed:
                raise UserError(f"there is room for {room} new tokens, a cycle needs {needed}")
        except UserError as error:
            words = " ".join(candidate.turns[0].split())[:40] if asked else "a passage"
            raise UserError(f"prompt {len(rooms) + 1} ({words!r}): {error}") from error
        rooms.append(room)
    return rooms


def choose_prompts(config, target, candidates: list) -> tuple[list, dict]:
    """The first `num_prompts` candidates whose plain text is free of loops, and a few that loop.

    All turns of a question are played: each is a prompt, which holds the answers before it.
    Passages that are marked as loops come last, and only as many are decoded as are missing: a text
    that was marked in another dtype, or on other cores, may be another here. Returns (prompts,
    counts): each prompt with the number of its candidate; the number of texts, and of those that
    looped, by their marks where they were not decoded.
    """
    free, loops, few = [], [], max(1, config.num_prompts // 4)
    as_marked = config.temperature == 0 and config.max_new_tokens == MARKED_TOKENS

    def plain_text(number: int, task: str, prompt: list[int]) -> list[int]:
        check_prompt(target.config, prompt)
        seed = config.seed + number  # or all drawn texts would follow the same uniforms
        tokens = generate(target, prompt, seed=seed, **request_of(config, target)).tokens
        # Two tokens are one cycle at least; a shorter text says nothing about decoding.
        if len(tokens) > 2:
            (loops if is_loop(tokens) else free).append(Prompt(task, prompt, number, tokens))
        return tokens

    marked = [as_marked and candidate.loop for candidate in candidates]
    waiting = sorted(range(len(candidates)), key=marked.__getitem__)
    while waiting:
        if len(free) >= config.num_prompts and not (marked[waiting[0]] and len(loops) < few):
            break
        number = waiting.pop(0)
        candidate = candidates[number]
        if isinstance(candidate, Question):
            said = []
            for turn in candidate.turns:
                said.append(turn)
                prompt = target.chat.prompt(said)
                if len(said) > 1 and len(prompt) + config.max_new_tokens > target.config.context:
                    break  # it has outgrown the window: its earlier turns count
                answer = plain_text(number, candidate.category, prompt)
                answer = [token for token in answer if token not in target.chat.stops]
                said.append(target.chat.encoding.decode(answer))
        else:
            plain_text(number, candidate.task, candidate.tokens)
    looped = len(loops) + sum(marked[number] for number in waiting)
    counts = {"candidates": len(free) + looped, "looped": looped}
    print(f"{counts['looped']} of {counts['candidates']} candidate prompts end in a loop")
    return free + loops[:few], counts


def request_of(config, target) -> dict:
    """The arguments of `generate` for every text. A chat model stops when its answer ends."""
    return config.request | {"stop_token": None if target.chat is None else target.chat.stops}


# --------------------------------------------------------------------- writing them to a file


@dataclass(frozen=True)
class PromptsConfig:
    out_dir: str | None = option(None, WHICH_RUN)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16"])


def marked(target, head, text: Text, split: str, encoding) -> list[dict]:
    """Rows for prompts.jsonl: the passages of a split, and whether their greedy text is a loop.

    The text is the target's, whatever `head` drafts; with one it comes sooner. A passage whose
    words would be cut into other tokens when they are read again is left out.
    """
    rows = []
    for task, tokens, _ in from_documents(text.documents[split], encoding, CANDIDATES)[0]:
        words = encoding.decode(tokens)
        if encode_prompt(encoding, words) == tokens:
            loop = is_loop(generate(target, tokens, MARKED_TOKENS, head=head).tokens)
            rows.append({"category": task, "split": split, "turns": [words], "loop": loop})
    return rows


def main() -> None:
    config = parse(PromptsConfig, about=__doc__)
    folder = find_run(config.out_dir, needs_head=False)
    head = "auto" if trained_heads(folder) else None
    target, head, encoding = load(folder, head, config.device, config.dtype)
    path, rows = result_file(folder, MARKED), []
    for split in ("valid", "test"):
        text = held_out_text(target.about, split)
        if text is None:
            raise UserError("this target has no held-out text of its own")
        rows += marked(target, head, text, split, encoding)
        free = sum(not row["loop"] for row in rows if row["split"] == split)
        print(f"{split}: {free} passages whose text is no loop", flush=True)
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    print(f"written: {path}, {len(rows)} passages")


if __name__ == "__main__":
    run(main)
