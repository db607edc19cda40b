"""Conversations: how a chat model's turns become tokens, and the questions that are asked of it.

A chat model was trained on texts of one form: special tokens and a few words tell who speaks. For
its own form it answers; for any other it rambles. A form is kept in the target's checkpoint as the
plain strings between what people say (pretrained.py finds them out from the model's template):

    begin      before the first question, the model's usual instructions included
    to_answer  from the end of a question to the start of its answer
    to_ask     from the end of an answer to the next question
    trims      true where blanks around what people say are left out

What somebody *says* never becomes a special token, whatever it spells: a user who types
"<|im_end|>" has typed ten characters, and ended nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from cli import UserError
from data import encode


class Chat:
    """The form of conversations with one target."""

    def __init__(self, encoding: tiktoken.Encoding, form: dict):
        """`form`: the parts of the file's docstring, by name."""
        self.encoding, self.form = encoding, form
        names = sorted(encoding.special_tokens_set, key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.opening = self.tokens([(form["begin"], True)])
        # A turn ends with the token that the model writes when it has said all; what else stands
        # between two turns, we write.
        self.stop, *self.to_answer = self.tokens([(form["to_answer"], True)])
        stop, *self.to_ask = self.tokens([(form["to_ask"], True)])
        if stop != self.stop or self.stop not in encoding._special_tokens.values():
            raise UserError("this chat format does not end its turns with one special token")

    @classmethod
    def of(cls, encoding: tiktoken.Encoding, tokenizer: dict) -> "Chat | None":
        """That of a checkpoint's `tokenizer`; None if its target knows no conversations."""
        return cls(encoding, tokenizer["chat"]) if "chat" in tokenizer else None

    def tokens(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Of (text, trusted) pieces in a row: only trusted ones may hold special tokens.

        Text between two special tokens is encoded as a whole, wherever its pieces meet: so does
        the model's own tokenizer.
        """
        tokens, plain = [], ""
        for text, trusted in pieces:
            for part in self.special.split(text) if trusted else [text]:
                if trusted and part in self.encoding.special_tokens_set:
                    tokens += encode(self.encoding, plain)
                    tokens.append(self.encoding.encode_single_token(part))
                    plain = ""
                else:
                    plain += part
        return tokens + encode(self.encoding, plain)

    def prompt(self, turns: list[str]) -> list[int]:
        """Tokens of a conversation up to where the next answer begins.

        `turns`: what was said, in turn by the user and by the model, the user first and last.
        """
        turns = [said.strip() for said in turns] if self.form.get("trims") else turns
        if not all(turns[::2]):
            raise UserError("the prompt is empty: give at least one character")
        between = [self.form["to_answer"], self.form["to_ask"]]
        pieces = [(self.form["begin"], True)]
        for i, said in enumerate(turns):
            pieces += [(said, False), (between[i % 2], True)]
        return self.tokens(pieces)


@dataclass(frozen=True)
class Question:
    """One conversation to be had: what the user says, turn by turn, whatever is answered."""

    category: str
    turns: list[str]
    split: str = "test"


def read_questions(path: Path) -> list[Question]:
    """The questions of a file in the form of Spec-Bench and MT-bench: one JSON object a line.

    Raises UserError, naming the line, for one without `turns`.
    """
    questions = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = row["turns"]
            if (
                not isinstance(turns, list)
                or not turns
                or not all(isinstance(turn, str) and turn.strip() for turn in turns)
            ):
                raise ValueError("its turns are not texts")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, line {number} is no question: {reason}") from error
        questions.append(Question(row.get("category", "file"), turns, row.get("split", "test")))
    return questions
