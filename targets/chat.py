"""Conversations: how a chat model's turns become tokens.

A chat model was trained on texts of one form: special tokens and a few words tell who speaks. In
its own form it answers; in any other it rambles. The target's checkpoint keeps the form as plain
strings between the messages. pretrained.py reads them off the model's template:

    begin      before the first question, the model's usual instructions included
    to_answer  from the end of a question to the start of its answer
    to_ask     from the end of an answer to the next question
    trims      true where blanks around a message are left out

A message never becomes a special token, whatever it spells. A user with "<|im_end|>" in a message
has typed ten characters, and ended nothing.
"""

import re

import tiktoken

from plumbing.cli import UserError
from targets.bpe import encode


class Chat:
    """The form of conversations with one target."""

    def __init__(self, encoding: tiktoken.Encoding, form: dict, ends: tuple[int, ...] = ()):
        """`form`: the four parts in this file's docstring, by name.

        `ends`: tokens that end an answer as well; Llama 3 has several.
        """
        self.encoding, self.form = encoding, form
        names = sorted(encoding.special_tokens_set, key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.opening = self.tokens([(form["begin"], True)])
        # A turn ends with a token that the model writes. The other tokens between turns are ours.
        self.stop, *self.to_answer = self.tokens([(form["to_answer"], True)])
        stop, *self.to_ask = self.tokens([(form["to_ask"], True)])
        if stop != self.stop or self.stop not in encoding._special_tokens.values():
            raise UserError("this chat format does not end its turns with one special token")
        self.stops = frozenset({self.stop, *ends})

    @classmethod
    def of(cls, encoding: tiktoken.Encoding, tokenizer: dict) -> "Chat | None":
        """The form in a checkpoint's `tokenizer`; None if its target knows no conversations."""
        if "chat" not in tokenizer:
            return None
        return cls(encoding, tokenizer["chat"], tokenizer.get("ends", ()))

    def tokens(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Tokens of (text, trusted) pieces in a row: only trusted ones may hold special tokens.

        Text between two special tokens is encoded as a whole, wherever its pieces meet. The
        model's own tokenizer does the same.
        """
        tokens, plain = [], ""
        for text, trusted in pieces:
            for part in self.special.split(text):
                if trusted and part in self.encoding.special_tokens_set:
                    tokens += encode(self.encoding, plain)
                    tokens.append(self.encoding.encode_single_token(part))
                    plain = ""
                else:
                    plain += part
        return tokens + encode(self.encoding, plain)

    def prompt(self, turns: list[str]) -> list[int]:
        """Tokens of a conversation up to the start of the next answer.

        `turns`: messages, in turn by the user and by the model, the user first and last.
        """
        turns = [said.strip() for said in turns] if self.form.get("trims") else turns
        if not all(turns[::2]):
            raise UserError("the prompt is empty: give at least one character")
        between = [self.form["to_answer"], self.form["to_ask"]]
        pieces = [(self.form["begin"], True)]
        for i, said in enumerate(turns):
            pieces += [(said, False), (between[i % 2], True)]
        return self.tokens(pieces)
