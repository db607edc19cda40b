"""Training data without any data set: the target writes it, its hidden states kept on the way.

A draft head has to guess what the target *writes*; how well it guesses other people's text is beside
the point. And a chat model can be made to write conversations out of nothing (Magpie, arXiv
2406.08464): give it the opening of its chat format alone, and what it finds likeliest next is a
user's question. Let it go on, and it answers; then comes the next question.

    opening | question | to_answer | answer | to_ask | question | ...
     ours      target's    ours      target's   ours

Left to itself a small model asks for little but small talk and advice. So for two questions of
three we write the first words as well, and it finds the rest: a text to be translated, a sum, a
program. `BEGINNINGS` are spread over the uses that people make of such models (InstructGPT,
2203.02155, table 1).

Many conversations are written at once, one token each per pass: all are equally long, so that they
need no padding, and the weights are read once for all. Answers are written at several temperatures,
since decoding will be asked for both, certain text and varied text. `learn` marks the answers, the
token included that ends them: heads are held to these, and take their vocabulary from these.

A target that knows no conversations goes on with passages of a text, nearly greedily, since greedy
text is what its heads will mostly be asked for. Such text soon turns in circles, and a loop has
nothing to teach: texts are short, and what only repeats is not `learn`t.

The hidden state behind every token falls out of the writing, so it is kept, not computed again: in
float16, in files that are mapped into memory and may be larger than it.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chat import Chat
from cli import UserError, write_json
from draft_head import Batch
from sampling import sample_many

TEMPERATURES = (0.2, 0.5, 0.9)  # of answers, in turn
CONTINUING = 0.05  # temperature of texts that are no conversations
OPENING = 32  # tokens of other text that these go on from
LOOP = 8  # tokens: a run of so many that was there before is a loop
ASKING = 0.8  # temperature of questions: at 1 a small model asks nonsense
ON_CPU, ON_GPU = 192, 1024  # texts written at once: more of them gain nothing any more
HELD_OUT = 20  # one text in so many is never learnt from
CACHE_BYTES = 8e9  # the most that their keys and values may take
TURN_TOKENS = 160  # a turn that is longer is cut off: small models like to repeat themselves
FREE = 1 / 3  # share of the questions that the target begins as it likes
# The first words of the others.
BEGINNINGS = (
    *("What is", "Who", "Why do", "Why is", "How does", "How can", "When did", "Where", "Explain"),
    *("Describe", "What is the difference between", "Compare", "Is it true that", "Help me"),
    *("Can you recommend", "My friend", "I am planning", "I need advice. ", "Pretend that you are"),
    *("Write a short story about", "Write an email to", "Write a poem", "Give me five ideas for"),
    *("Solve this problem step by step. ", "A train", "If I have", "How many", "Calculate"),
    *("What is the probability", "There are", "A shop sells", "Write a Python function that"),
    *("Write a function in JavaScript", "What does this code do?\n\n```python\n"),
    *("Write a C program", "Fix the bug in this code:\n\n```", "Write an SQL query"),
    "Make this email more polite:\n\n",
    *("Rewrite this paragraph in simpler words:\n\n", "Correct the grammar of this text:\n\n"),
    *("Read this text and answer the question below.\n\n", "Here is a passage:\n\n"),
    *("List all the names mentioned in this text:\n\n", "Classify the following review:\n\n"),
    *("Summarize the following text:\n\n", "Summarise this passage in two sentences.\n\n"),
    *("Give me a short summary of this article:\n\n", "TL;DR of the following story:\n\n"),
    *("What are the main points of this text?\n\n", "Translate into Italian: "),
    *("Translate the following text into Spanish:\n\n", "Please translate into German:\n\n"),
    *("Translate this passage into French:\n\n", "Translate from German into English:\n\n"),
    "Translate the following Spanish text into English:\n\n",
    "Please translate this French paragraph into English:\n\n",
    "Translate this Portuguese text into English:\n\n",
)
# What all of this comes to: text written by other rules is not gone on with.
CHATS, TEXTS = (
    hashlib.sha256(repr(rules).encode()).hexdigest()[:8]
    for rules in (
        (TEMPERATURES, ASKING, TURN_TOKENS, FREE, BEGINNINGS),
        (CONTINUING, OPENING, LOOP),
    )
)


class Conversations:
    """What a target has written so far: windows of tokens, which of them to learn, and states.

    `tokens` (N, T + 1), `learn` (N, T + 1) bool, `hidden` (N, T, D) float16, on disk.
    """

    def __init__(self, folder: Path, about: dict):
        """`about`: the target and all that decides what it writes: "length" T, "width" D, ...

        Raises UserError where what is there was written in another way.
        """
        self.folder, self.about, self.count, self.seconds = folder, about, 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if self.index.is_file():
            try:
                saved = json.loads(self.index.read_text())
                self.count, self.seconds = saved.pop("count"), saved.pop("seconds")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.index} is damaged: remove {folder}") from error
            for name, value in about.items():
                if saved.get(name) != value:
                    raise UserError(
                        f"{folder} was written with {name} {saved.get(name)}, now it is {value}: "
                        f"use the old value, another --out_dir, or remove the folder"
                    )
        self.map()

    @property
    def bytes(self) -> int:
        arrays = self.tokens, self.learn, self.hidden
        return sum(array.numel() * array.element_size() for array in arrays)

    @property
    def index(self) -> Path:
        return self.folder / "index.json"

    def map(self) -> None:
        length, width = self.about["length"], self.about["width"]
        self.tokens, self.learn, self.hidden = (
            self.mapped(name, dtype, shape)
            for name, dtype, shape in (
                ("tokens", torch.int32, (length + 1,)),
                ("learn", torch.bool, (length + 1,)),
                ("hidden", torch.float16, (length, width)),
            )
        )

    def mapped(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if self.count == 0:
            return torch.empty((0, *shape), dtype=dtype)
        path, size = self.folder / name, self.count * int(np.prod(shape))
        if not path.is_file() or path.stat().st_size < size * dtype.itemsize:
            raise UserError(f"{path} is cut short: remove {self.folder}")
        return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(-1, *shape)

    def append(self, tokens: Tensor, learn: Tensor, hidden: Tensor, seconds: float) -> None:
        """Write further windows, all of them or none: the index, which counts them, comes last."""
        arrays = (tokens.int(), learn, hidden.half())
        for name, array in zip(("tokens", "learn", "hidden"), arrays):
            array = array.contiguous().cpu().numpy()
            # What an interrupt left behind the last counted window is overwritten.
            with open(self.folder / name, "r+b" if self.count else "wb") as file:
                file.seek(self.count * array[0].nbytes)
                file.write(array)
                file.truncate()
        self.count, self.seconds = self.count + len(tokens), self.seconds + seconds
        write_json(self.index, self.about | {"count": self.count, "seconds": self.seconds})
        self.map()


class Written:
    """Some of the conversations, as heads learn from them: what `features.Features` is to a text."""

    def __init__(self, target, conversations: Conversations, held_out: bool):
        """One window in `HELD_OUT` is held out, and never learnt from."""
        self.target, self.conversations = target, conversations
        numbers = torch.arange(conversations.count)
        self.numbers = numbers[(numbers % HELD_OUT == 0) == held_out]
        self.windows = conversations.tokens[self.numbers]  # (N, T + 1), as in Features

    def batch(self, index: Tensor) -> Batch:
        weight, written = self.target.embed.weight, self.conversations
        picks = self.numbers[index]
        parts = written.tokens[picks].long(), written.hidden[picks], written.learn[picks]
        tokens, hidden, learn = (part.to(weight.device) for part in parts)
        return Batch(tokens, hidden.to(weight.dtype), learn)

    def counts(self) -> Tensor:
        tokens = self.windows[self.conversations.learn[self.numbers]].long()
        return torch.bincount(tokens, minlength=self.target.config.vocab_size)


# ------------------------------------------------------------------------------------- writing


def beginnings(chat: Chat) -> list[list[int]]:
    """The first tokens of questions: none, then those of `BEGINNINGS`."""
    return [[], *(chat.tokens([(words, False)]) for words in BEGINNINGS)]


class Turns:
    """Many conversations at once: who is speaking in each, and what we write between turns."""

    def __init__(self, chat: Chat, count: int, device, generator):
        """`generator` decides how questions begin."""
        turn = torch.arange(count) % len(TEMPERATURES)
        self.heat, self.generator = torch.tensor(TEMPERATURES, device=device)[turn], generator
        # Script 0 comes before an answer, the others before questions and a little into them.
        scripts = [chat.to_answer] + [chat.to_ask + words for words in beginnings(chat)]
        longest = max(map(len, scripts))
        padded = [script + [0] * (longest - len(script)) for script in scripts]
        self.scripts = torch.tensor(padded, device=device)  # (1 + Q, longest)
        self.lengths = torch.tensor([len(script) for script in scripts], device=device)
        self.stop = chat.stop
        self.script = self.question(count)
        self.left = self.lengths[self.script] - len(chat.to_ask)  # of our script, still to come
        self.said = torch.zeros_like(self.left)  # in this turn, our share of a question left out

    def question(self, count: int) -> Tensor:
        """How each of `count` questions begins (B,): script 1 is for those that are free to."""
        u = torch.rand(count, generator=self.generator, device=self.lengths.device)
        begun = ((u - FREE) / (1 - FREE) * (len(self.lengths) - 2)).long()  # 0, 1, .. above FREE
        return torch.where(u < FREE, 1, 2 + begun)

    def temperatures(self) -> Tensor:
        """Of the next token of each text (B,)."""
        return torch.where(self.script == 0, self.heat, ASKING)

    def next(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """What the target would write (B,) -> what is written (B,), which of it is to be learnt."""
        ours, answering = self.left > 0, self.script == 0
        place = self.lengths[self.script] - self.left.clamp(min=1)
        endless = ~ours & (self.said >= TURN_TOKENS)
        choice = torch.where(endless, self.stop, choice)
        token = torch.where(ours, self.scripts[self.script, place], choice)
        learn = ~ours & ~endless & answering
        over = ~ours & (token == self.stop)
        self.said = torch.where(over, 0, self.said + ~ours)
        following = torch.where(answering, self.question(len(token)), 0)
        self.script = torch.where(over, following, self.script)
        self.left = torch.where(over, self.lengths[self.script], self.left - ours.long())
        return token, learn


class Continuations:
    """Texts that the target just goes on with, for one that knows no conversations."""

    def __init__(self, count: int, device):
        self.heat = torch.full((count,), CONTINUING, device=device)

    def temperatures(self) -> Tensor:
        return self.heat

    def next(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        return choice, torch.ones_like(choice, dtype=torch.bool)


def news(tokens: Tensor) -> Tensor:
    """Which tokens (B, T) do not end a run of `LOOP` tokens that their text has had before (B, T)."""
    fresh = []
    for text in tokens.tolist():
        seen, marks = set(), [True] * len(text)
        for end in range(LOOP, len(text) + 1):
            run = tuple(text[end - LOOP : end])
            marks[end - 1] = run not in seen
            seen.add(run)
        fresh.append(marks)
    return torch.tensor(fresh, device=tokens.device)


@torch.inference_mode()
def write(target, opening: Tensor, length: int, turns, banned: Tensor, generator):
    """Go on from `opening` (B, P) to T + 1 tokens, T = `length`, one pass a token for all.

    `turns.next` has the last word on each token; `banned` tokens are never chosen. Returns tokens
    (B, T + 1), learn (B, T + 1) and hidden (B, T, D) in float16.
    """
    count, device = len(opening), opening.device
    tokens = torch.zeros(count, length + 1, dtype=torch.int32, device=device)
    learn = torch.zeros(count, length + 1, dtype=torch.bool, device=device)
    shape = (count, length, target.config.width)
    hidden = torch.zeros(shape, dtype=torch.float16, device=device)
    cache, place = target.new_cache(length, batch=count), 0
    while place <= length:
        end = place + opening.shape[1]
        tokens[:, place:end] = opening
        if end > length:
            return tokens, learn, hidden
        states = target(opening, cache)  # (B, P or 1, D)
        hidden[:, place:end] = states
        logits = target.lm_head(states[:, -1]).float()  # (B, V)
        logits[:, banned] = -torch.inf
        p = logits.div_(turns.temperatures()[:, None]).softmax(-1)
        u = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        token, to_learn = turns.next(sample_many(p, u))
        opening, place = token[:, None], end
        learn[:, place] = to_learn


def write_until(written: Conversations, target, encoding, chat, openings, enough) -> None:
    """Have the target write until `enough(tokens, seconds)`; an interrupt costs the last batch.

    In chats, or, where `chat` is None, going on from some of `openings` (N, P). Raises UserError
    for a window in which nothing can be written.
    """
    device, length = target.embed.weight.device, written.about["length"]
    one = target.new_cache(length).keys
    at_once = int(CACHE_BYTES // (2 * one.numel() * one.element_size()))
    at_once = max(1, min(at_once, ON_GPU if device.type == "cuda" else ON_CPU))
    stop = encoding.eot_token if chat is None else chat.stop
    banned = sorted(set(encoding._special_tokens.values()) - {stop})
    banned = torch.tensor(banned, device=device, dtype=torch.long)
    needed = len(chat.opening) + max(map(len, beginnings(chat))) if chat is not None else 0
    if needed >= length:
        raise UserError(f"--window {length} is too small: chats begin with up to {needed} tokens")
    if chat is None:
        shuffle = torch.Generator().manual_seed(written.about["seed"])
        openings = openings[torch.randperm(len(openings), generator=shuffle)]
        # So that one which comes again, and then nearly the same text, is held out again or never.
        openings = openings[: len(openings) // HELD_OUT * HELD_OUT or None]
    while not enough(written.count * length, written.seconds):
        if shutil.disk_usage(written.folder).free < written.bytes:
            print("written: no more, it has taken half of the room there was on the disk")
            break
        begin = time.monotonic()
        # Of the windows written before alone: a run that was interrupted writes what it would have.
        seed = written.about["seed"] * 1_000_003 + written.count
        generator = torch.Generator(device).manual_seed(seed)
        if chat is not None:
            opening = torch.tensor([chat.opening] * at_once)
            turns = Turns(chat, at_once, device, generator)
        else:
            # None of them twice before each was taken: nearly greedy texts would be the same.
            opening = openings[(written.count + torch.arange(at_once)) % len(openings)]
            turns = Continuations(at_once, device)
        opening = opening.to(device)
        tokens, learn, hidden = write(target, opening, length, turns, banned, generator)
        if chat is None:
            learn = learn & news(tokens)
        seconds = time.monotonic() - begin
        written.append(tokens, learn, hidden, seconds)
        print(
            f"written: {written.count:,} texts of {length} tokens, {written.learn.sum().item():,} "
            f"tokens to learn, {at_once * length / seconds:,.0f} tokens/s",
            flush=True,
        )
