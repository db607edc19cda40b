"""What a target writes for its heads to learn from: the right tokens, with the right states.

A head that is held to the user's questions, or learns from states that are one token off, still
learns something, and only drafts worse than it could. And an hour of writing that an interrupt
spoils, or that is read back as what another target wrote, would be believed all the same.
"""

from types import SimpleNamespace

import pytest
import torch
from toys import FALSE_ALARM, SPECIAL, chat_tokenizer, chi_square_p_value, tiny_target

from plumbing.cli import UserError
from sampling import distribution
from targets.bpe import build_encoding
from targets.chat import Chat
from targets.written import (
    ASKING,
    CONTINUING,
    HELD_OUT,
    LOOP,
    TEMPERATURES,
    TURN_TOKENS,
    Continuations,
    Conversations,
    Turns,
    Written,
    not_repeated,
    self_written,
    write,
    write_until,
)

CPU = torch.device("cpu")
ENCODING = build_encoding(chat_tokenizer())
CHAT = Chat.of(ENCODING, chat_tokenizer())
STOP, SAID = CHAT.stop, 100  # 100: some token that the target says


def chat_target():
    return tiny_target(seed=3, vocab=ENCODING.known, context=128)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def free_questions(monkeypatch):
    """But where a test says so, we write no first words."""
    monkeypatch.setattr("targets.written.FREE", 1.0)
    monkeypatch.setattr("targets.written.BEGINNINGS", ())


# --------------------------------------------------------------------------------- whose turn it is


def play(choices: list[int], chat=CHAT) -> tuple[list[int], list[bool]]:
    """What is written where the target would choose these tokens one after the other."""
    turns = Turns(chat, 1, CPU, generator())
    rows = [turns.next(torch.tensor([choice])) for choice in choices]
    return [token.item() for token, _ in rows], [learn.item() for _, learn in rows]


def test_question_and_answer_take_turns_with_our_words_between_them():
    """Each turn ends with the target's own stop token; of ours nothing is up to the target."""
    to_answer, to_ask = CHAT.to_answer, CHAT.to_ask
    expected = [101, 102, STOP, *to_answer, 103, STOP, *to_ask, 104, STOP, *to_answer, 105, 106]
    choices = [101, 102, STOP, *([SAID] * len(to_answer)), 103, STOP, *([STOP] * len(to_ask))]
    choices += [104, STOP, *([SAID] * len(to_answer)), 105, 106]
    tokens, learn = play(choices)
    assert tokens == expected
    # Only answers are to be learnt, and that they end.
    answers = {expected.index(103), expected.index(103) + 1, len(expected) - 2, len(expected) - 1}
    assert {i for i, one in enumerate(learn) if one} == answers


def test_each_conversation_takes_its_own_turns():
    turns, alone = Turns(CHAT, 3, CPU, generator()), [play, play, play]
    choices = torch.randint(90, 110, (60, 3), generator=generator())
    choices[choices > 105] = STOP
    rows = [turns.next(row) for row in choices]
    tokens, learn = (torch.stack(part, 1).tolist() for part in zip(*rows))
    for i, one in enumerate(alone):
        assert one(choices[:, i].tolist()) == (tokens[i], learn[i])
    assert len({tuple(row) for row in learn}) == 3


def test_a_turn_that_does_not_end_is_ended():
    """That it ends there was not the target's choice, and is not to be learnt."""
    ours = [SAID] * len(CHAT.to_answer)
    tokens, learn = play([SAID] * (TURN_TOKENS + 1) + ours + [SAID] * (TURN_TOKENS + 3))
    answer = TURN_TOKENS + 1 + len(ours)
    assert tokens[:answer] == [SAID] * TURN_TOKENS + [STOP, *CHAT.to_answer]
    assert tokens[answer : answer + TURN_TOKENS + 1] == [SAID] * TURN_TOKENS + [STOP]
    assert [i for i, one in enumerate(learn) if one] == list(range(answer, answer + TURN_TOKENS))


def test_the_length_of_a_turn_is_its_own():
    """It is not that of the conversation so far."""
    long = [SAID] * (TURN_TOKENS - 1)
    answer = [*([SAID] * len(CHAT.to_answer)), *long, STOP]
    tokens, learn = play([*long, STOP, *answer, *([SAID] * len(CHAT.to_ask)), *long])
    assert tokens[-len(long) :] == long and not any(learn[-len(long) :])


def test_questions_begin_with_words_of_ours_or_freely(monkeypatch):
    """First questions and later ones; that many of them freely, the others in every way."""
    monkeypatch.setattr("targets.written.FREE", 0.25)
    beginnings = ("Why", "Sum it up: ", "How")
    monkeypatch.setattr("targets.written.BEGINNINGS", beginnings)
    ways = [(), *(tuple(CHAT.tokens([(words, False)])) for words in beginnings)]
    turns = Turns(CHAT, 1000, CPU, generator())
    # Each turn is one token and its end, whatever we write before.
    rows = [turns.next(torch.where(turns.said == 0, SAID, STOP))[0] for _ in range(150)]
    answer, begun = [*CHAT.to_answer, SAID, STOP, *CHAT.to_ask], [[], []]
    for text in torch.stack(rows, 1).tolist():
        place = 0
        for found in begun:
            way = next(w for w in ways if text[place:][: len(w) + 2] == [*w, SAID, STOP])
            place += len(way) + 2
            assert text[place:][: len(answer)] == answer
            place += len(answer)
            found.append(ways.index(way))
    for found in begun:
        counts = torch.tensor(found).bincount(minlength=len(ways))
        assert chi_square_p_value(counts, torch.full((4,), 0.25)) > FALSE_ALARM


def test_a_token_that_ends_a_turn_ends_none_among_our_own_words():
    """A form may have a whole turn of its own between the two, an instruction for example."""
    chat = SimpleNamespace(stop=2, to_answer=[7, 2, 8], to_ask=[9, 2])
    tokens, learn = play([101, 2, 0, 0, 0, 102, 2, 0, 0, 103], chat)
    assert tokens == [101, 2, 7, 2, 8, 102, 2, 9, 2, 103]
    assert [i for i, one in enumerate(learn) if one] == [5, 6]


def test_answers_are_written_at_several_temperatures_and_questions_at_one():
    turns = Turns(CHAT, 4, CPU, generator())
    assert turns.temperatures().tolist() == pytest.approx([ASKING] * 4)
    turns.next(torch.tensor([STOP, SAID, STOP, STOP]))
    first, second, third = TEMPERATURES
    expected = [first, ASKING, third, first]
    assert turns.temperatures().tolist() == pytest.approx(expected) and second != ASKING
    assert Continuations(4, CPU).temperatures().tolist() == pytest.approx([CONTINUING] * 4)


# ------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("chatting", [True, False])
def test_the_states_kept_are_those_that_each_token_was_chosen_from(chatting):
    """They fall out of the writing, through a cache; a single pass over the text gives the same."""
    target, length = chat_target(), 50
    opening = torch.tensor([CHAT.opening] * 4) if chatting else torch.arange(40, 60).view(4, 5)
    turns = Turns(CHAT, 4, CPU, generator()) if chatting else Continuations(4, CPU)
    banned = torch.tensor([0, 1])
    tokens, learn, hidden = write(target, opening, length, turns, banned, generator())
    assert tokens.shape == learn.shape == (4, length + 1) and hidden.dtype == torch.float16
    assert torch.equal(tokens[:, : opening.shape[1]].long(), opening)
    assert not learn[:, : opening.shape[1]].any()
    states = target(tokens[:, :-1].long())
    torch.testing.assert_close(hidden.double(), states, rtol=2e-3, atol=1e-3)
    assert len(set(map(tuple, tokens.tolist()))) == 4
    if not chatting:
        assert learn[:, opening.shape[1] :].all()


@pytest.mark.parametrize("chatting", [True, False])
def test_each_token_is_a_sample_of_the_targets_law_at_its_temperature(chatting):
    """By the share of the law below it: uniform, if state, law and token belong together."""
    target, length, count = chat_target(), 100, 1000
    opening = torch.tensor([CHAT.opening] * count) if chatting else torch.full((count, 1), 9)
    turns = Turns(CHAT, count, CPU, generator()) if chatting else Continuations(count, CPU)
    few = [STOP, *range(100, 112)]  # so that turns are short
    banned = torch.tensor([token for token in range(ENCODING.known) if token not in few])
    tokens, learn, _ = write(target, opening, length, turns, banned, generator(1))
    logits = target.lm_head(target(tokens[:, :-1].long())).float()
    logits[..., banned] = -torch.inf
    p = distribution(logits / turns.temperature[:, None, None], temperature=1.0)
    p, token = p[learn[:, 1:]], tokens[:, 1:][learn[:, 1:]].long()
    assert len(token) > 1000 and set(token.tolist()) == set(few)
    # Where the token fell in the cumulated law, somewhere in its own share of it: a uniform number.
    own = p.gather(-1, token[:, None])[:, 0]
    below = p.cumsum(-1).gather(-1, token[:, None])[:, 0] - own
    place = below + own * torch.rand(len(own), generator=generator(2))
    counts = (10 * place).long().clamp(0, 9).bincount(minlength=10)
    assert chi_square_p_value(counts, torch.ones(10)) > FALSE_ALARM
    assert own.mean() > 2 / len(few)  # and the law is no uniform one itself


def test_a_text_ends_in_the_middle_of_our_words_too():
    """Wherever the window ends, it is full, and has a state for each token but the last."""
    target = chat_target()
    for length in range(len(CHAT.opening) + 1, len(CHAT.opening) + 6):
        opening, turns = torch.tensor([CHAT.opening] * 2), Turns(CHAT, 2, CPU, generator())
        tokens, _, hidden = write(target, opening, length, turns, torch.tensor([0]), generator())
        assert tokens.shape == (2, length + 1) and hidden.shape == (2, length, 16)
        states = target(tokens[:, :-1].long())
        torch.testing.assert_close(hidden.double(), states, rtol=2e-3, atol=1e-3)


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr("targets.written.ON_CPU", 6)


def written_in(folder, chat, batches: int) -> Conversations:
    written = Conversations(folder, {"target": "t", "length": 50, "width": 16, "seed": 5})
    openings = None if chat else torch.arange(40, 130).view(18, 5)
    write_until(written, chat_target(), ENCODING, chat, openings, 6 * 50 * batches)
    return written


@pytest.mark.parametrize("chat", [CHAT, None], ids=["chat", "text"])
def test_writing_goes_on_where_it_stopped_as_if_it_had_not(tmp_path, few_at_once, chat):
    whole = written_in(tmp_path / "whole", chat, 3)
    written_in(tmp_path / "parts", chat, 1)
    parts = written_in(tmp_path / "parts", chat, 3)
    assert whole.count == parts.count == 18
    for name in ("tokens", "learn", "hidden"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert len(set(map(tuple, whole.tokens.tolist()))) == 18  # no batch is written twice
    assert whole.learn.any()


def test_writing_ends_with_the_batch_that_reaches_the_amount(tmp_path, few_at_once):
    """Openings count as well; texts that are there already are not written again, nor removed."""
    for amount, count in ((1, 6), (6 * 50, 6), (6 * 50 + 1, 12), (1, 12)):
        written = Conversations(tmp_path, {"target": "t", "length": 50, "width": 16, "seed": 5})
        write_until(written, chat_target(), ENCODING, CHAT, None, amount)
        assert written.count == count, amount


def test_a_text_that_is_begun_again_is_held_out_again_or_never(tmp_path, few_at_once):
    """Nearly greedy texts from one opening are nearly the same."""
    written = Conversations(tmp_path, {"target": "t", "length": 12, "width": 16, "seed": 5})
    openings = torch.arange(50)[:, None].expand(-1, 5) + 10  # two and a half times HELD_OUT
    write_until(written, chat_target(), ENCODING, None, openings, 12 * 120)
    begun, held_out = written.tokens[:, 0].tolist(), torch.arange(120) % HELD_OUT == 0
    held = {token for token, out in zip(begun, held_out) if out}
    assert len(set(begun)) < 120  # some came again
    assert not held & {token for token, out in zip(begun, held_out) if not out}


def test_writing_takes_half_of_the_disk_at_most(tmp_path, few_at_once, monkeypatch, capsys):
    free = SimpleNamespace(free=6 * 50 * 16 * 2)  # less than a batch of hidden states and tokens
    monkeypatch.setattr("targets.written.shutil.disk_usage", lambda folder: free)
    assert (
        written_in(tmp_path, CHAT, 3).count == 6 and "half of the room" in capsys.readouterr().out
    )


def test_no_special_token_is_written_but_the_one_that_ends_a_turn(tmp_path, few_at_once):
    written = written_in(tmp_path, CHAT, 2)
    answers = written.tokens[written.learn].tolist()
    assert not set(answers) & (set(SPECIAL.values()) - {STOP})
    alone = written_in(tmp_path / "text", None, 2)
    assert not set(alone.tokens.flatten().tolist()) & (set(SPECIAL.values()) - {ENCODING.eot_token})


def test_a_window_without_room_for_a_question_is_refused(tmp_path, few_at_once):
    for length in (len(CHAT.opening) - 1, len(CHAT.opening)):
        about = {"target": "t", "length": length, "width": 16, "seed": 5}
        written = Conversations(tmp_path / str(length), about)
        with pytest.raises(UserError, match="--head_window .* too small"):
            write_until(written, chat_target(), ENCODING, CHAT, None, 1)


# ------------------------------------------------------------------------------------ on disk

ABOUT = {"target": "0123", "length": 7, "width": 4, "seed": 0}


def windows(count: int, seed: int = 0):
    tokens = torch.randint(50, (count, 8), generator=generator(seed), dtype=torch.int32)
    learn = torch.rand(count, 8, generator=generator(seed)) < 0.5
    return tokens, learn, torch.randn(count, 7, 4, generator=generator(seed)).half()


def assert_holds(conversations: Conversations, *batches) -> None:
    expected = [torch.cat(parts) for parts in zip(*batches)]
    found = conversations.tokens, conversations.learn, conversations.hidden
    assert conversations.count == len(expected[0])
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_what_is_appended_comes_back_in_this_process_and_in_the_next(tmp_path):
    conversations, first, second = Conversations(tmp_path, ABOUT), windows(3), windows(2, 1)
    assert conversations.count == 0 and conversations.tokens.shape == (0, 8)
    conversations.append(*first, seconds=1.5)
    assert_holds(conversations, first)
    again = Conversations(tmp_path, ABOUT)
    again.append(*second, seconds=2.0)
    for one in (again, Conversations(tmp_path, ABOUT)):
        assert_holds(one, first, second)
        assert one.seconds == 3.5


@pytest.mark.parametrize("name", ABOUT)
def test_what_was_written_in_another_way_is_refused_by_name(tmp_path, name):
    Conversations(tmp_path, ABOUT).append(*windows(3), seconds=1.0)
    with pytest.raises(UserError, match=f"with {name} {ABOUT[name]}, now it is 9"):
        Conversations(tmp_path, ABOUT | {name: 9})


@pytest.mark.parametrize("file", ["tokens", "learn", "hidden"])
def test_an_append_that_was_interrupted_has_not_happened(tmp_path, file):
    """Wherever it stopped: the index, which counts the windows, is written last."""
    conversations, first, second = Conversations(tmp_path, ABOUT), windows(3), windows(2, 1)
    conversations.append(*first, seconds=1.0)
    with open(tmp_path / file, "ab") as half:
        half.write(b"half a window")
    again = Conversations(tmp_path, ABOUT)
    assert_holds(again, first)
    again.append(*second, seconds=1.0)
    assert_holds(Conversations(tmp_path, ABOUT), first, second)


def test_the_index_is_written_after_all_that_it_counts(tmp_path, monkeypatch):
    conversations, first = Conversations(tmp_path, ABOUT), windows(3)
    conversations.append(*first, seconds=1.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversations.append(*windows(2, 1), seconds=1.0)
    assert_holds(Conversations(tmp_path, ABOUT), first)


@pytest.mark.parametrize("file", ["tokens", "learn", "hidden"])
@pytest.mark.parametrize("lost", [1, None])
def test_a_file_that_is_cut_short_or_gone_is_refused_by_name(tmp_path, file, lost):
    Conversations(tmp_path, ABOUT).append(*windows(3), seconds=1.0)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-lost]) if lost else path.unlink()
    with pytest.raises(UserError, match=f"{file} is cut short"):
        Conversations(tmp_path, ABOUT)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", "7", '{"count": 3}'])
def test_a_damaged_index_is_refused(tmp_path, index):
    Conversations(tmp_path, ABOUT).append(*windows(3), seconds=1.0)
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(UserError, match="damaged: remove"):
        Conversations(tmp_path, ABOUT)


def test_a_loop_is_news_in_its_first_round_alone():
    word = list(range(LOOP))  # the shortest loop that can be one
    text = [90, *word, 91, *word, *word[:3], 92, 93]
    marks = not_repeated(torch.tensor([text, list(range(len(text)))]))
    # Back at the word's end all of it was there before; what follows was not.
    assert [i for i, new in enumerate(marks[0].tolist()) if not new] == [2 * LOOP + 1]
    assert marks[1].all()
    short = not_repeated(torch.tensor([[1, 2] * LOOP]))[0].tolist()
    assert short == [i < LOOP + 1 for i in range(2 * LOOP)]  # a run's first, and one a token later


# ------------------------------------------------------------------------------ as heads learn it


def held_and_learnt(conversations) -> tuple[Written, Written]:
    target = tiny_target(vocab=50, width=4)
    return Written(target, conversations, held_out=True), Written(target, conversations, False)


def test_one_window_in_twenty_is_held_out_and_stays_so(tmp_path):
    """Also when more is written: a head is never validated on what it has learnt from."""
    conversations, before = Conversations(tmp_path, ABOUT), set()
    for seed in range(4):
        conversations.append(*windows(33, seed), seconds=1.0)
        held, learnt = (set(part.numbers.tolist()) for part in held_and_learnt(conversations))
        assert not held & learnt and held | learnt == set(range(conversations.count))
        assert len(held) == -(-conversations.count // 20) and before <= held
        before = held


def test_a_batch_is_the_windows_asked_for_with_their_states(tmp_path):
    conversations = Conversations(tmp_path, ABOUT)
    conversations.append(*windows(45), seconds=1.0)
    for part in held_and_learnt(conversations):
        index = torch.tensor([2, 0])
        tokens, hidden, learn = part.batch(index)
        rows = part.numbers[index]
        assert torch.equal(tokens, conversations.tokens[rows].long()) and hidden.dtype.itemsize == 8
        assert torch.equal(tokens, part.windows[index].long())
        assert torch.equal(learn, conversations.learn[rows])
        assert torch.equal(hidden.half(), conversations.hidden[rows])


def test_tokens_are_counted_where_they_are_to_be_learnt(tmp_path):
    conversations = Conversations(tmp_path, ABOUT)
    tokens, learn, hidden = windows(41)
    conversations.append(tokens, learn, hidden, seconds=1.0)
    _, learnt = held_and_learnt(conversations)
    kept = [i for i in range(41) if i % 20]
    expected = tokens[kept][learn[kept]].long().bincount(minlength=50)
    assert torch.equal(learnt.counts(), expected) and expected.sum() < tokens[kept].numel()


class Passages:
    """A text of which only the training part may be continued: row i is token 60 + i all along."""

    def windows(self, split: str, length: int) -> torch.Tensor:
        assert split == "train"
        return (60 + torch.arange(40, dtype=torch.int32))[:, None].expand(-1, length)


@pytest.mark.parametrize("form", ["chat", "text", "text with a token that begins it"])
def test_heads_learn_from_a_part_of_the_texts_and_the_rest_is_held_out(tmp_path, form, few_at_once):
    """A window in both parts would flatter the head; states of another pass would mislead it."""
    tokenizer = chat_tokenizer() if form == "chat" else chat_tokenizer(None)
    tokenizer |= {"begin": 5} if "begins" in form else {}
    target, about = chat_target(), {"fingerprint": "f", "tokenizer": tokenizer}
    text = None if form == "chat" else Passages()
    amounts = 50, 30 * 50, 7, torch.float32
    learnt, held = self_written(tmp_path, target, about, text, *amounts)
    assert target.embed.weight.dtype == torch.float64
    assert (len(learnt), len(held)) == (28, 2)
    numbers = learnt.numbers.tolist() + held.numbers.tolist()
    assert sorted(numbers) == list(range(30))
    for part in (learnt, held):
        tokens, hidden, learn = part.batch(torch.arange(len(part)))
        torch.testing.assert_close(hidden, target(tokens[:, :-1]), rtol=2e-3, atol=2e-3)
        assert learn.any()
        if form == "chat":
            assert tokens[:, : len(CHAT.opening)].tolist() == [CHAT.opening] * len(part)
            continue
        begin = [5] if "begins" in form else []
        assert tokens[:, : len(begin)].tolist() == [begin] * len(part)
        opening = tokens[:, len(begin) : 25]  # half a window, what begins it included
        assert (opening == opening[:, :1]).all() and (opening[:, 0] >= 60).all()
        assert not learn[:, :25].any() and learn[:, 25].all()
    again, _ = self_written(tmp_path, target, about, text, *amounts)
    assert torch.equal(again.windows, learnt.windows)


@pytest.mark.parametrize(
    "name, values",
    [
        ("target", ("g", 50, 7, torch.float32)),
        ("length", ("f", 40, 7, torch.float32)),
        ("seed", ("f", 50, 8, torch.float32)),
        ("dtype", ("f", 50, 7, torch.bfloat16)),
    ],
)
def test_heads_do_not_learn_from_what_was_written_in_another_way(
    tmp_path, name, values, few_at_once
):
    """By another target above all: the head would learn to guess another model's states."""

    def write_by(fingerprint: str, length: int, seed: int, dtype) -> None:
        about = {"fingerprint": fingerprint, "tokenizer": chat_tokenizer()}
        self_written(tmp_path, chat_target(), about, None, length, 300, seed, dtype)

    write_by("f", 50, 7, torch.float32)
    with pytest.raises(UserError, match=f"was written with {name} "):
        write_by(*values)
