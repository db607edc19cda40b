"""What is decoded when tau and speed are measured: prompts of several tasks.

Acceptance depends on what is written, so results are given per task, as Spec-Bench (arXiv
2401.07851) does. A model of plain text goes on with passages of the text kept for testing: `code`
(function bodies), `docstring` (prose inside code), `docs` (reference prose). A chat model is asked
the questions of prompts.jsonl. Read next: bench.py.
"""

import ast
import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

import data
from chat import Question, read_questions
from cli import UserError
from features import Text
from model import check_prompt

QUESTIONS = Path(__file__).with_name("prompts.jsonl")  # for chat models; none is ever trained on
PROMPT_TOKENS = 64
CANDIDATES = 1500  # prompts to look for, in all tasks together
MIN_PROMPTS = 5  # a task with fewer prompts says nothing, and is left out

# ------------------------------------------------------------------------ passages of a text


def passages(document: data.Document) -> list[tuple[str, str]]:
    """The (task, text) pieces of a document that a prompt can be cut from."""
    if document.task:  # prose: from the first paragraph on, then from others well apart
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


def from_documents(
    documents: list[data.Document],
    encoding: tiktoken.Encoding,
    count: int,
    length: int = PROMPT_TOKENS,
) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """About `count` prompts of `length` tokens, shared out evenly between the tasks.

    Returns ([(task, tokens), ...], the tasks left out for want of prompts). The tasks take
    turns. Which passages are taken is decided by a hash of their text: fixed, yet spread widely.
    """
    found = defaultdict(dict)
    for document in documents:
        for task, text in passages(document):
            if len(text) >= length:  # a token is at least one byte
                order = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
                found[task][order] = text
    shares, left_out = [], []
    for task in sorted(found):
        share = -(-count // len(found))  # rounded up
        taken = []
        for order in sorted(found[task]):
            tokens = data.encode(encoding, found[task][order])[:length]
            if len(tokens) == length:
                taken.append((task, tokens))
            if len(taken) == share:
                break
        if len(taken) < min(MIN_PROMPTS, share):
            left_out.append(task)
        else:
            shares.append(taken)
    in_turn = [
        row[i] for i in range(max(map(len, shares), default=0)) for row in shares if i < len(row)
    ]
    return in_turn, left_out


# ------------------------------------------------------------------- what a benchmark asks for


def in_turn(questions: list[Question]) -> list[Question]:
    """The first of each category, then the second of each, ..: so that a part is of all kinds."""
    seen, places = Counter(), []
    for question in questions:
        seen[question.category] += 1
        places.append(seen[question.category])
    return [q for _, q in sorted(zip(places, questions), key=lambda pair: pair[0])]


def load_prompts(config, target, text: Text | None, encoding) -> list:
    """Candidates, (task, tokens) or questions: --prompts_file, or what is kept for this --split.

    For a chat model these are questions of prompts.jsonl, for others passages of held-out text.
    """
    chat = target.chat
    if config.prompts_file is None and chat is None:
        if text is None:
            raise UserError("this target has no held-out text of its own: give --prompts_file")
        found, left_out = from_documents(text.documents[config.split], encoding, CANDIDATES)
        if left_out:
            print(f"left out for want of prompts: {', '.join(left_out)}")
    else:
        path = Path(config.prompts_file or QUESTIONS)
        try:
            if path.suffix == ".jsonl":
                found = read_questions(path)
            else:
                lines = path.read_text("utf-8").splitlines()
                found = [Question("file", [line]) for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {path}: {error}") from error
        if config.prompts_file is None:
            found = in_turn([question for question in found if question.split == config.split])
        if chat is None:
            found = [(q.category, data.encode_prompt(encoding, q.turns[0])) for q in found]
    if not found:
        raise UserError("there is no prompt to measure with: give more text, or --prompts_file")
    return found


def check_prompts(config, target, depth: int, prompts: list) -> list[int]:
    """How many tokens each prompt leaves room for. Raises UserError before any time is spent."""
    rooms = []
    for candidate in prompts:
        if isinstance(candidate, Question):
            prompt = target.chat.prompt(candidate.turns[:1])
        else:
            prompt = candidate[1]
        check_prompt(target.config, prompt)
        rooms.append(min(config.max_new_tokens, target.config.context - len(prompt)))
        if rooms[-1] < depth + 2:
            raise UserError(
                f"{rooms[-1]} new tokens leave no whole cycle of a draft {depth} deep: at least "
                f"{depth + 2} are needed for each prompt"
            )
    return rooms
