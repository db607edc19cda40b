"""The text is the ground everything else is measured on, so its mistakes would be silent ones.

A byte lost in the tokenizer changes bits per byte; text on both sides of a split makes every head
look better than it is; a prompt drawn differently on two machines makes their numbers incomparable.
"""

import random
import re
from collections import Counter

import pytest
import torch

from plumbing.cli import UserError
from study.prompts import from_documents, passages
from targets.bpe import (
    END_OF_TEXT,
    PIECES,
    build_encoding,
    encode,
    learn_merges,
    learn_tokenizer,
    token_bytes,
    tokenize,
)
from targets.text import (
    SPLITS,
    Document,
    describe,
    load_documents,
    overlap,
    read_paths,
    split_of,
    windows,
)

TEXT = (
    "def reload(self, path):\n    value_1 = read(path)  # read it, then read it again\n"
    "    return value_1 + 1234567 if value_1 else None\n\n\n\treader = reading(readers)\n"
    "Größe, naïve café, 東京 東京 東京, 😀😀 😀! aaaa aaaaaaaa \u00a0\u2003 \r\n __init__ __init__\n"
) * 3


@pytest.fixture(scope="module")
def encoding():
    return build_encoding(learn_tokenizer([TEXT], 400))


@pytest.fixture(scope="module")
def library() -> dict[str, list[Document]]:
    return load_documents(None)


# ------------------------------------------------------------------------------------ tokenizer

STRANGE = {
    "all bytes": bytes(range(256)),
    "random": random.Random(0).randbytes(2000),
    "truncated utf-8": "東京😀".encode()[:-2] + b" and on",
    "overlong and surrogate": b"\xc0\x80 \xed\xa0\x80 \xed\xb3\xbf \xf5\xff",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301".encode(),
    "nul": b"\0\0a\0\nb\0",
    "blanks": b" \t\n\r\n   \n\n\t\t \x0b\x0c \xc2\x85\xe2\x80\xa8 x  y   ",
    "end of text, spelled": END_OF_TEXT.encode(),
    "empty": b"",
}


@pytest.mark.parametrize("raw", STRANGE.values(), ids=STRANGE)
def test_any_bytes_survive_encoding(encoding, raw):
    tokens = encode(encoding, raw)
    assert encoding.decode_bytes(tokens) == raw
    assert encoding.eot_token not in tokens


@pytest.mark.parametrize("raw", STRANGE.values(), ids=STRANGE)
def test_bytes_carried_in_a_string_are_encoded_as_the_bytes(encoding, raw):
    carried = raw.decode("utf-8", "surrogateescape")  # as sys.argv and os.listdir do
    assert encode(encoding, carried) == encode(encoding, raw)


def test_random_strings_survive_encoding(encoding):
    rng = random.Random(1)
    for _ in range(200):
        characters = [
            chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in "x" * 20
        ]
        text = "".join(characters)
        assert encoding.decode_bytes(encode(encoding, text)) == text.encode()


def slow_learning(text: str, vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding as one would explain it: count everything anew for every merge."""
    words = [[bytes([byte]) for byte in piece.encode()] for piece in re.findall(PIECES, text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        a, b = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(a + b, len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return ranks


def slow_encoding(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Within each piece, always join the neighbours that make up the token learnt first."""
    tokens = []
    for piece in re.findall(PIECES, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joins = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            joins = [join for join in joins if join[0] is not None]
            if not joins:
                break
            _, i = min(joins)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        tokens += [ranks[part] for part in parts]
    return tokens


@pytest.mark.parametrize("text", [TEXT, "a" * 50 + " " + "ab" * 30, "mississippi " * 4, ""])
def test_merges_are_those_of_a_slow_learner(text):
    assert learn_merges([text], 330) == slow_learning(text, 330)


def test_tokens_are_those_of_a_slow_encoder():
    ranks = learn_merges([TEXT], 400)
    encoding = build_encoding(learn_tokenizer([TEXT], 401))
    unseen = "def reader(reading_2):\n\treturn 'naïve' + \"東京\" if aaaaaa else 98765\n    " + TEXT
    assert encoding.encode_ordinary(unseen) == slow_encoding(unseen, ranks)


def test_pieces_drop_no_character():
    rng = random.Random(2)
    for text in [TEXT, "".join(chr(rng.randrange(0x3000)) for _ in range(5000))]:
        assert "".join(re.findall(PIECES, text)) == text


def test_learning_is_deterministic_and_reaches_the_size_asked_for():
    first, again = (learn_tokenizer(iter([TEXT]), 350) for _ in range(2))
    assert first == again
    assert build_encoding(first).n_vocab == 350  # with END_OF_TEXT, which is the last
    assert build_encoding(first).eot_token == 349
    assert first["tokens"][:256] == [chr(byte) for byte in range(256)]


def test_learning_ends_early_where_nothing_repeats():
    ranks = learn_merges(["abcdefgh"], 400)
    assert len(ranks) == 256


def test_tokenizer_survives_a_checkpoint(encoding, tmp_path):
    torch.save(learn_tokenizer([TEXT], 400), tmp_path / "tokenizer.pt")
    kept = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    assert build_encoding(kept).encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)


def test_token_bytes_add_up_to_the_text(encoding):
    texts = [TEXT, "東京"]
    tokens = tokenize(encoding, texts)
    size = sum(len(text.encode()) for text in texts)
    assert token_bytes(encoding)[tokens].sum() == size
    assert (tokens == encoding.eot_token).sum() == 2 and tokens[-1] == encoding.eot_token


# -------------------------------------------------------------------------------------- splits


def test_split_is_a_fixed_function_of_the_name():
    known = {"os": "train", "typing": "train", "21": "test", "29": "valid"}
    assert {name: split_of(name) for name in known} == known
    shares = Counter(split_of(f"name {i}") for i in range(5000))
    assert shares["train"] / 5000 == pytest.approx(0.90, abs=0.02)
    assert shares["valid"] / 5000 == pytest.approx(0.05, abs=0.015)
    assert shares["test"] / 5000 == pytest.approx(0.05, abs=0.015)


def test_no_group_stands_in_two_splits(library, text_folder):
    for splits in (library, load_documents([str(text_folder)])):
        for kind in ("name", "group"):
            members = [{getattr(d, kind) for d in splits[split]} for split in SPLITS]
            assert sum(map(len, members)) == len(set.union(*members))


def test_every_file_of_a_package_has_its_package_as_group(library):
    files = [d for d in library["train"] if d.name.startswith("asyncio/")]
    files += [d for d in library["valid"] + library["test"] if d.name.startswith("asyncio/")]
    assert len(files) > 5 and {d.group for d in files} == {"asyncio"}


def test_the_standard_library_is_text_without_tests(library):
    documents = [d for split in library.values() for d in split]
    names = {d.name for d in documents}
    assert {"argparse.py", "json/decoder.py", "topics/assert"} <= names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert {d.task for d in documents} == {"", "docs"}


def test_held_out_standard_library_gives_prompts_of_all_three_tasks(library):
    encoding = build_encoding({"name": "bpe", "pattern": PIECES, "tokens": BYTES})
    for split in ("valid", "test"):
        chosen, left_out = from_documents(library[split], encoding, 30)
        assert Counter(prompt.task for prompt in chosen) == {
            "code": 10,
            "docs": 10,
            "docstring": 10,
        }
        assert not left_out


BYTES = [chr(byte) for byte in range(256)]

# ------------------------------------------------------------------------------------ user data


def test_a_folder_gives_a_task_for_each_of_its_folders(text_folder):
    documents = read_paths([str(text_folder)])
    assert Counter(d.task for d in documents) == {"fables": 60, "letters": 60}
    assert documents == read_paths([str(text_folder)])


def test_one_large_file_is_cut_into_parts_that_make_it_up(tmp_path):
    text = "".join(f"line {i} of the file\n" for i in range(20_000)) + "and no line break"
    (tmp_path / "book.txt").write_text(text)
    parts = read_paths([str(tmp_path / "book.txt")])
    assert "".join(part.text for part in parts) == text
    assert 90 <= len(parts) <= 101 and len({part.group for part in parts}) == len(parts)
    assert {part.task for part in parts} == {"book"}
    splits = load_documents([str(tmp_path / "book.txt")])
    assert sum(len(d.text) for split in splits.values() for d in split) == len(text)


def test_what_is_no_text_in_a_folder_is_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.bin").write_bytes(b"looks like text\0")
    assert [d.text for d in read_paths([str(tmp_path)])] == ["text"]


def test_a_folder_given_as_a_dot_still_has_a_task(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("prose")
    monkeypatch.chdir(tmp_path)
    assert [d.task for d in read_paths(["."])] == [tmp_path.name]


@pytest.mark.parametrize("content", [b"binary \xff\xfe", b"binary \0", b"", b"too short"])
def test_unusable_data_is_refused_by_name(tmp_path, content):
    file = tmp_path / "given.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="given.txt"):
        load_documents([str(file)])


def test_missing_data_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        load_documents([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="0 characters"):
        load_documents([str(tmp_path)])


def test_the_description_changes_with_any_character(text_folder):
    splits = load_documents([str(text_folder)])
    before = describe(splits, [str(text_folder)])
    first = splits["valid"][0]
    splits["valid"][0] = Document(first.name, first.group, first.text[:-1] + "!", first.task)
    after = describe(splits, [str(text_folder)])
    assert before["hash"] != after["hash"] and before["bytes"] == after["bytes"]


# ---------------------------------------------------------------------------- windows, overlap


def test_windows_are_consecutive_and_drop_only_the_rest():
    rows = windows(torch.arange(23), 5)
    assert rows.shape == (4, 5) and torch.equal(rows.flatten(), torch.arange(20))
    assert windows(torch.arange(3), 5).shape == (0, 5)


def test_overlap_is_the_share_of_repeated_text():
    generator = torch.Generator().manual_seed(0)
    train, other = torch.randint(0, 500, (2, 5000), generator=generator, dtype=torch.int32)
    assert overlap(train, train) == 1
    assert overlap(train, other) == 0
    half = torch.cat([train[1000:2000], other[:1000]])
    assert overlap(train, half) == pytest.approx(0.5, abs=0.02)
    assert overlap(train, other, n=1) > 0.99  # each single token does occur


# -------------------------------------------------------------------------------------- prompts


def test_prompts_have_the_exact_length_and_are_the_same_every_time(encoding, text_folder):
    documents = load_documents([str(text_folder)])["valid"]
    first, left_out = from_documents(documents, encoding, 7, length=16)
    again, _ = from_documents(list(reversed(documents)), encoding, 7, length=16)
    assert first == again and not left_out
    assert all(len(tokens) == 16 for _, tokens, _ in first)
    assert Counter(prompt.task for prompt in first) == {"fables": 4, "letters": 4}  # 7, rounded up


def test_a_task_with_too_few_prompts_is_reported(encoding):
    many = [Document(f"m{i}", f"m{i}", f"{i} " + TEXT, "many") for i in range(20)]
    few = [Document("f", "f", "a few words that are just about long enough", "few")]
    chosen, left_out = from_documents(many + few, encoding, 20, length=16)
    assert left_out == ["few"] and {prompt.task for prompt in chosen} == {"many"}


PYTHON = '''"""About the module."""
\f
def f(x):
    """About f."""
    # first
    return x


class C:
    def g(self):
        return 2
'''


def test_passages_of_python_are_bodies_and_docstrings():
    found = passages(Document("m.py", "m", PYTHON))
    assert [text for task, text in found if task == "docstring"] == [
        "About the module.",
        "About f.",
    ]
    code = [text for task, text in found if task == "code"]
    assert code == ["    return x\n", "        return 2\n"]  # a form feed ends no line of Python
    assert passages(Document("m.py", "m", "def broken(:")) == []


def test_a_docstring_with_a_lone_surrogate_is_no_obstacle(encoding):
    document = Document("m.py", "m", 'def f():\n    """%s \\ud800"""\n' % ("words " * 20))
    from_documents([document], encoding, 4, length=16)
