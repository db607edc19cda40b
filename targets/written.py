"""Training data without any data set: the target writes it, and its hidden states are kept.

A draft head has to guess the target's own writing; other people's text is beside the point. And a
chat model can write conversations out of nothing (Magpie, arXiv 2406.08464). After the opening of
its chat format alone, the likeliest continuation is a user's question. The model then
goes on to the answer, and to the next question.

    opening | question | to_answer | answer | to_ask | question | ...
     ours      target's    ours      target's   ours

Left to itself a small model asks for little but small talk and advice. So we write the first words
of two questions in three. The model finds the rest: a text to translate, a sum, a program.
`BEGINNINGS` are spread over people's uses of such models (InstructGPT, 2203.02155, table 1).

Many conversations are written at once, one token each per pass. All are equally long and need no
padding. The weights are read once for all. Answers are written at several temperatures, since
decoding will meet both certain and varied text.

`learn` marks the answers, each with the token at its end. Heads are held to these tokens, and take
their vocabulary from them.

A target without conversations continues passages of a text. It does so nearly greedily, since its
heads will mostly draft greedy text. Such text soon turns in circles, and a loop teaches nothing. So
texts are short, and `learn` leaves out tokens that only repeat.

The hidden state behind every token is a by-product of the writing, so it is kept, in float16. Its
file is mapped into memory and may be larger than it.
"""

import copy
import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draft_head import Batch
from plumbing.cli import UserError
from plumbing.files import only_writer, write_json
from sampling import LAST_BELOW_1, sample
from targets.bpe import build_encoding
from targets.chat import Chat
from targets.features import check_states
from targets.text import Text, read_text

TEMPERATURES = (0.2, 0.5, 0.9)  # of answers, in turn
CONTINUING = 0.05  # temperature of texts without conversations
OPENING = 32  # tokens of other text at their beginning
LOOP = 8  # tokens: a run of so many is a loop where its text had it before
ASKING = 0.8  # temperature of questions: at 1 a small model asks nonsense
ON_CPU, ON_GPU = 192, 1024  # texts written at once: more of them gain nothing any more
CACHE_BYTES = 8e9  # the most that their keys and values may take
HELD_OUT = 20  # one text in so many is never learnt from
TURN_TOKENS = 160  # a longer turn is cut off: small models like to repeat themselves
BLOCK = 256  # tokens, see `sample_many`
FREE = 1 / 3  # share of the questions that the target begins as it likes
# The first words of the others, between bars.
FIRST_WORDS = (
    "What is|Who|Why do|Why is|How does|How can|When did|Where|Explain|Describe|"
    "What is the difference between|Compare|Is it true that|Help me|Can you recommend|My friend|"
    "I am planning|I need advice. |Pretend that you are|Write a short story about|"
    "Write an email to|Write a poem|Give me five ideas for|Solve this problem step by step. |"
    "A train|If I have|How many|Calculate|What is the probability|There are|A shop sells|"
    "Write a Python function that|Write a function in JavaScript|"
    "What does this code do?\n\n```python\n|Write a C program|Fix the bug in this code:\n\n```|"
    "Write an SQL query|Make this email more polite:\n\n|"
    "Rewrite this paragraph in simpler words:\n\n|Correct the grammar of this text:\n\n|"
    "Read this text and answer the question below.\n\n|Here is a passage:\n\n|"
    "List all the names mentioned in this text:\n\n|Classify the following review:\n\n|"
    "Summarize the following text:\n\n|Summarise this passage in two sentences.\n\n|"
    "Give me a short summary of this article:\n\n|TL;DR of the following story:\n\n|"
    "What are the main points of this text?\n\n|Translate into Italian: |"
    "Translate the following text into Spanish:\n\n|Please translate into German:\n\n|"
    "Translate this passage into French:\n\n|Translate from German into English:\n\n|"
    "Translate the following Spanish text into English:\n\n|"
    "Please translate this French paragraph into English:\n\n|"
    "Translate this Portuguese text into English:\n\n"
)
BEGINNINGS = tuple(FIRST_WORDS.split("|"))
# A hash of the rules for chats, and of those for texts. Text by other rules is not reused.
RULES = (TEMPERATURES, ASKING, TURN_TOKENS, FREE, BEGINNINGS), (CONTINUING, OPENING, LOOP)
CHATS, TEXTS = (hashlib.sha256(repr(rules).encode()).hexdigest()[:8] for rules in RULES)


class Conversations:
    """All texts by a target so far, on disk.

    `tokens` (N, T + 1), `hidden` (N, T, D) float16. `learn` (N, T + 1) bool: tokens to be learnt.
    """

    def __init__(self, folder: Path, about: dict):
        """`about`: the target and all settings of its writing: "length" T, "width" D, ...

        Raises UserError for texts by another target or other settings.
        """
        self.folder, self.about, self.count, self.seconds = folder, about, 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if self.index.is_file():
            try:
                saved = json.loads(self.index.read_text("utf-8"))
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
        self.tokens = self.mapped("tokens", torch.int32, length + 1)
        self.learn = self.mapped("learn", torch.bool, length + 1)
        self.hidden = self.mapped("hidden", torch.float16, length, width)

    def mapped(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        if self.count == 0:
            return torch.empty((0, *shape), dtype=dtype)
        path, size = self.folder / name, self.count * int(np.prod(shape))
        if not path.is_file() or path.stat().st_size < size * dtype.itemsize:
            raise UserError(f"{path} is cut short: remove {self.folder}")
        return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(-1, *shape)

    def append(self, tokens: Tensor, learn: Tensor, hidden: Tensor, seconds: float) -> None:
        """Write further windows, all of them or none: the index counts them, and comes last.

        Raises UserError for states beyond float16.
        """
        arrays = {"tokens": tokens.int(), "learn": learn, "hidden": hidden.half()}
        check_states(arrays["hidden"])
        for name, array in arrays.items():
            array = array.contiguous().cpu().numpy()
            # Bytes behind the last counted window are left by an interrupt, and overwritten.
            with open(self.folder / name, "r+b" if self.count else "wb") as file:
                file.seek(self.count * array[0].nbytes)
                file.write(array)
                file.truncate()
        self.count, self.seconds = self.count + len(tokens), self.seconds + seconds
        write_json(self.index, self.about | {"count": self.count, "seconds": self.seconds})
        self.map()


class Written:
    """The texts for heads to learn from, or the held-out ones; see `features.Features`."""

    def __init__(self, target, conversations: Conversations, held_out: bool):
        """One window in `HELD_OUT` is held out, and never learnt from."""
        self.target, self.conversations = target, conversations
        numbers = torch.arange(conversations.count)
        self.numbers = numbers[(numbers % HELD_OUT == 0) == held_out]
        self.windows = conversations.tokens[self.numbers]  # (N, T + 1), as in Features

    def __len__(self) -> int:
        return len(self.windows)

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
    """Many conversations at once: the speaker in each, and our own words between turns.

    `Turns` and `Continuations` have one interface, for `write`:

        temperatures()     of the next token of each text (B,)
        next(choice)       the target's choices (B,) -> the tokens written, and which to learn
    """

    def __init__(self, chat: Chat, count: int, device, generator):
        """`generator` draws the beginnings of questions."""
        turn = torch.arange(count) % len(TEMPERATURES)
        self.temperature = torch.tensor(TEMPERATURES, device=device)[turn]
        self.generator = generator
        # Script 0 comes before an answer. The others come before a question, with its first words.
        scripts = [chat.to_answer] + [chat.to_ask + words for words in beginnings(chat)]
        longest = max(map(len, scripts))
        padded = [script + [0] * (longest - len(script)) for script in scripts]
        self.scripts = torch.tensor(padded, device=device)  # (1 + Q, longest)
        self.lengths = torch.tensor([len(script) for script in scripts], device=device)
        self.stop = chat.stop
        self.script = self.question(count)
        self.left = self.lengths[self.script] - len(chat.to_ask)  # of our script, still to come
        self.said = torch.zeros_like(self.left)  # in this turn, without our part of a question

    def question(self, count: int) -> Tensor:
        """The script of each of `count` questions (B,): 1 leaves all its words to the target."""
        u = torch.rand(count, generator=self.generator, device=self.lengths.device)
        begun = ((u - FREE) / (1 - FREE) * (len(self.lengths) - 2)).long()  # 0, 1, .. above FREE
        return torch.where(u < FREE, 1, 2 + begun)

    def temperatures(self) -> Tensor:
        """For the next token of each text (B,)."""
        return torch.where(self.script == 0, self.temperature, ASKING)

    def next(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """The target's choices (B,) -> the texts' tokens (B,), and whether each is learnt (B,)."""
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
    """Texts that just go on, for a target without conversations."""

    def __init__(self, count: int, device):
        self.temperature = torch.full((count,), CONTINUING, device=device)

    def temperatures(self) -> Tensor:
        return self.temperature

    def next(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        return choice, torch.ones_like(choice, dtype=torch.bool)


def not_repeated(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T) bool: false at the end of `LOOP` tokens that its text had before."""
    fresh = []
    for text in tokens.tolist():
        seen, marks = set(), [True] * len(text)
        for end in range(LOOP, len(text) + 1):
            run = tuple(text[end - LOOP : end])
            marks[end - 1] = run not in seen
            seen.add(run)
        fresh.append(marks)
    return torch.tensor(fresh, device=tokens.device)


def sample_many(p: Tensor, u: Tensor) -> Tensor:
    """`sample` for many rows (..., V) of a large vocabulary: first a block of tokens, then a token.

    To add up a block is several times faster than to write down each sum on the way. u (...) is
    float64, since it decides twice.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % BLOCK)) if p.shape[-1] % BLOCK else p
    blocks = blocks.unflatten(-1, (-1, BLOCK))  # (..., V / BLOCK, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    block = sample(sums, u)[..., None]  # (..., 1)
    # The place of u within its block, as a share of the block: a uniform number again.
    inside = u[..., None] * sums.sum(-1, keepdim=True) - (sums.cumsum(-1) - sums).gather(-1, block)
    share = (inside / sums.gather(-1, block)).clamp(0.0, LAST_BELOW_1)[..., 0]
    rows = block[..., None].expand(*block.shape, BLOCK)
    return block[..., 0] * BLOCK + sample(blocks.gather(-2, rows)[..., 0, :], share)


@torch.inference_mode()
def write(target, opening: Tensor, length: int, turns, banned: Tensor, generator):
    """Continue `opening` (B, P) up to T + 1 tokens, T = `length`, one pass a token for all.

    `turns.next` has the last word on each token; `banned` tokens are never chosen. Returns tokens
    (B, T + 1), learn (B, T + 1) and hidden (B, T, D) in float16.
    """
    count, device = len(opening), opening.device
    tokens = torch.zeros(count, length + 1, dtype=torch.int32, device=device)
    learn = torch.zeros(count, length + 1, dtype=torch.bool, device=device)
    shape = (count, length, target.config.width)
    hidden = torch.zeros(shape, dtype=torch.float16, device=device)
    cache, place = target.new_cache(length, batch=count), 0
    while True:
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


def write_until(written, target, encoding, chat, openings, amount: int, temperature=None) -> None:
    """Have the target write `amount` tokens in all; an interrupt costs the last batch.

    `temperature`: of answers and of continuations; None: those of the recipes.

    It writes conversations; where `chat` is None, continuations of `openings` (N, P). Raises
    UserError for a window without room for a question.
    """
    device, length = target.embed.weight.device, written.about["length"]
    one = target.new_cache(length).keys
    at_once = int(CACHE_BYTES // (2 * one.numel() * one.element_size()))
    at_once = max(1, min(at_once, ON_GPU if device.type == "cuda" else ON_CPU))
    if chat is None:
        stop = encoding.eot_token
        shuffle = torch.Generator().manual_seed(written.about["seed"])
        openings = openings[torch.randperm(len(openings), generator=shuffle)]
        # A multiple of HELD_OUT: each opening is held out in every round, or in none. Its texts are
        # nearly the same each time.
        openings = openings[: len(openings) // HELD_OUT * HELD_OUT or None]
    else:
        stop, openings = chat.stop, torch.tensor([chat.opening])
        needed = len(chat.opening) + max(map(len, beginnings(chat)))
        if needed >= length:
            reason = f"chats begin with up to {needed} tokens"
            raise UserError(f"--head_window {length} is too small: {reason}")
    control = {i for token, i in encoding._special_tokens.items() if token not in encoding.added}
    banned = sorted(control - {stop})
    banned = torch.tensor(banned, device=device, dtype=torch.long)
    while written.count * length < amount:
        if shutil.disk_usage(written.folder).free < written.bytes:
            print("written: no more, it has taken half of the room there was on the disk")
            break
        begin = time.monotonic()
        # The seed depends on the number of texts so far: an interrupted run writes the same texts.
        seed = written.about["seed"] * 1_000_003 + written.count
        generator = torch.Generator(device).manual_seed(seed)
        turns = Turns(chat, at_once, device, generator) if chat else Continuations(at_once, device)
        if temperature is not None:
            turns.temperature.fill_(temperature)
        # Every opening is used once before one is repeated: nearly greedy texts would be the same.
        opening = openings[(written.count + torch.arange(at_once)) % len(openings)].to(device)
        tokens, learn, hidden = write(target, opening, length, turns, banned, generator)
        if chat is None:
            learn = learn & not_repeated(tokens)
        seconds = time.monotonic() - begin
        written.append(tokens, learn, hidden, seconds)
        texts, learnt = f"{written.count:,} texts of {length} tokens", written.learn.sum().item()
        speed = f"{at_once * length / seconds:,.0f} tokens/s"
        left = (amount - written.count * length) / (at_once * length) * seconds / 60
        left = f"{max(0.0, left):.1f} min left"
        print(f"written: {texts}, {learnt:,} tokens to learn, {speed}, {left}", flush=True)


def self_written(
    folder: Path,
    target,
    checkpoint: dict,
    text: Text | None,
    length: int,
    tokens: int,
    seed: int,
    dtype: torch.dtype,
    temperature: float | None = None,
) -> tuple[Written, Written]:
    """Training and held-out texts by the target: `tokens` in windows of `length`.

    They are kept in `folder`; where there are too few, the target writes more. A target without a
    chat format continues passages of `text`; None: of the default text. `temperature`: see
    `write_until`. Raises UserError where another process writes there.
    """
    encoding = build_encoding(checkpoint["tokenizer"])
    chat = Chat.of(encoding, checkpoint["tokenizer"])
    about = {"target": checkpoint["fingerprint"], "length": length, "width": target.config.width}
    about |= {"seed": seed, "dtype": str(dtype), "rules": TEXTS if chat is None else CHATS}
    about |= {} if temperature is None else {"temperature": temperature}
    openings = None
    if chat is None:
        if text is None:
            text = read_text(None, ())
            text.use(checkpoint["tokenizer"])
        begin = torch.tensor(encoding.begin, dtype=torch.long)
        size = min(OPENING, length // 2) - len(begin)
        openings = text.windows("train", size).long()
        openings = torch.cat([begin.expand(len(openings), -1), openings], 1)
    with only_writer(folder):
        written = Conversations(folder, about)
        writer = copy.deepcopy(target).to(dtype)  # as it will be when it decodes
        write_until(written, writer, encoding, chat, openings, tokens, temperature)
        del writer  # as large as the target
    return Written(target, written, held_out=False), Written(target, written, held_out=True)
