"""Faults that users of systems like this one reported, tried here: see each test's first line.

Each is a kind of fault, with inputs of our own. What a target from elsewhere must not bring along
is in test_pretrained.py.
"""

import ast
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from toys import ScriptedHead, ScriptedTarget, random_prompts, tiny_head, tiny_target

import speculate
import train
from draft_head import HeadConfig, build_head
from drafts import Chain, GrowingTree, fixed_tree
from model import GPT, GPTConfig, Rotary
from plumbing.cli import UserError
from plumbing.files import (
    as_other_version,
    atomic_write,
    load_checkpoint,
    only_writer,
    save_checkpoint,
    scratch_of,
)
from plumbing.progress import KIND, Progress
from recipe import PRESETS
from speculate import generate
from study import ablation
from study.prompts import Passage, check_prompts, from_file, read_questions
from targets.bpe import PIECES, build_encoding, encode, tokenize
from targets.features import Features
from targets.runs import load_head, load_target, save_target
from targets.text import LEAST, by_hash, by_shares, describe, load_documents, read_paths, sizes
from targets.written import Conversations

CPU = torch.device("cpu")

# -------------------------------------------------------------------- two writers, broken files


def hold(folder, ready, leave, name=""):
    with only_writer(folder, name):
        ready.set()
        leave.wait(30)


def test_a_second_writer_is_told_who_writes(tmp_path):
    """Two commands on one folder would write each other's files."""
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path, ready, leave))
    first.start()
    assert ready.wait(30)
    with (
        pytest.raises(UserError, match=f"is being written by process {first.pid}:"),
        only_writer(tmp_path),
    ):
        pass
    first.kill()  # a lock of a dead process holds nothing
    first.join()
    with only_writer(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with only_writer(tmp_path):
        pass


def test_training_refuses_a_folder_that_is_being_written(tiny_run, tmp_path, call):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.glob("*.pt")}
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    first = context.Process(target=hold, args=(run, ready, leave))
    first.start()
    assert ready.wait(30)
    status, out, err = call(train.main, *tiny_run.flags, "--out_dir", run)
    leave.set()
    first.join()
    assert status == 2 and f"written by process {first.pid}" in err and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in run.glob("*.pt")}
    assert call(train.main, *tiny_run.flags, "--out_dir", run)[0] == 0


def save_often(path, value, together):
    together.wait(60)
    for _ in range(60):
        save_checkpoint(path, {"kind": "some numbers", "value": torch.full((2000,), value)})


def test_two_processes_that_save_one_file_leave_it_whole_at_any_time(tmp_path):
    """Under one scratch name a reader found it damaged in one look of eleven."""
    path, context = tmp_path / "head.pt", multiprocessing.get_context("spawn")
    save_checkpoint(path, {"kind": "some numbers", "value": torch.full((2000,), 0)})
    together = context.Barrier(2)
    writers = [context.Process(target=save_often, args=(path, v, together)) for v in (1, 2)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        assert load_checkpoint(path, "some numbers")["value"].unique().numel() == 1
        looks += 1
    assert looks > 5 and [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["head.pt"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], text=True,
                          capture_output=True).stdout.strip()  # fmt: skip
    path = tmp_path / "a[1].pt"
    here = scratch_of(path).name.removeprefix(f"{path.name}.").removesuffix(f".{os.getpid()}.part")
    left, other = f"{path.name}.{here}.{dead}.part", f"b.pt.{here}.{dead}.part"
    alive = f"{path.name}.{here}.{os.getppid()}.part"
    elsewhere = f"{path.name}.another-{here}.{dead}.part"  # a folder of two machines
    for name in (left, other, alive, elsewhere):
        (tmp_path / name).write_bytes(b"half")
    with atomic_write(path) as file:
        file.write(b"whole")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, other, alive, elsewhere}


def test_without_locks_the_scripts_are_there_all_the_same(tmp_path):
    """Windows has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; import bench, speculate, train"
    code += (
        f"; from plumbing.files import Path, only_writer; there = Path({str(tmp_path)!r}) / 'run'"
    )
    code += "\nwith only_writer(there): print(there.is_dir(), [*there.iterdir()])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True []\n", "")


@pytest.mark.parametrize(
    ("cell", "held"),
    [
        ("eagle-original", ("ablation", "eagle-original-seed0")),
        ("medusa-k2", ("conversations", "")),
    ],
)
def test_a_study_refuses_what_is_being_written(tiny_run, tmp_path, call, cell, held):
    """A head, or the texts that it learns from. Another head may be trained meanwhile."""
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    first = context.Process(target=hold, args=(run / held[0], ready, leave, held[1]))
    first.start()
    assert ready.wait(30)
    flags = ["--out_dir", run, "--cells", cell, "--seeds", 0, "--head_tokens", 100]
    status, _, err = call(ablation.main, *flags)
    leave.set()
    first.join()
    assert status == 2 and f"written by process {first.pid}" in err and err.count("\n") == 1
    assert not [*(run / "ablation").glob("*.pt")]


@pytest.mark.parametrize(
    "change", ["a setting more", "no config", "a weight more", "a weight less"]
)
@pytest.mark.parametrize("name", ["target.pt", "eagle.pt"])
def test_a_checkpoint_of_another_version_is_named(tiny_run, tmp_path, change, name):
    """It was a TypeError, a KeyError or a RuntimeError."""
    path = tmp_path / name
    checkpoint = load_checkpoint(
        tiny_run.folder / name, "target" if name == "target.pt" else "draft head"
    )
    if change == "a setting more":
        checkpoint["config"]["sliding_window"] = 5
    elif change == "no config":
        del checkpoint["config"]
    elif change == "a weight more":
        checkpoint["weights"]["blocks.0.extra"] = torch.zeros(2)
    else:
        checkpoint["weights"].popitem()
    save_checkpoint(path, checkpoint)
    target, _ = load_target(tiny_run.folder / "target.pt")
    with pytest.raises(UserError, match="was made by another version of this project") as caught:
        load_target(path) if name == "target.pt" else load_head(path, target)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def without(checkpoint: dict, *names: str) -> dict:
    for name in names[:-1]:
        checkpoint = checkpoint[name]
    return checkpoint.pop(names[-1])


@pytest.mark.parametrize(
    "file, lost, argv",
    [
        ("target.pt", ["tokenizer"], ["--head", "none"]),
        ("target.pt", ["tokenizer", "tokens"], ["--head", "none"]),
        ("target.pt", ["fingerprint"], []),
        ("eagle.pt", ["training"], ["--head", "eagle"]),
        ("eagle.pt", ["target"], ["--head", "eagle"]),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_named_while_decoding(
    tiny_run, tmp_path, call, file, lost, argv
):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    checkpoint = load_checkpoint(run / file, "target" if file == "target.pt" else "draft head")
    without(checkpoint, *lost)
    save_checkpoint(run / file, checkpoint)
    status, _, err = call(speculate.main, "--out_dir", run, "--device", "cpu", *argv)
    assert status == 2 and f"{run / file} was made by another version" in err, err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "lost",
    [["config", "kind"], ["config"], ["weights"], ["weights", "combine.weight"], ["training"]],
)
def test_a_checkpoint_that_lacks_a_part_is_named_while_training(tiny_run, tmp_path, call, lost):
    """As a head to start from, and as one that is there already."""
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    checkpoint = load_checkpoint(run / "eagle.pt", "draft head")
    without(checkpoint, *lost)
    path = run / "eagle.pt" if lost == ["training"] else tmp_path / "start.pt"
    save_checkpoint(path, checkpoint)
    more = ["--init", path, "--head", "eagle"]
    if lost == ["training"]:
        more = ["--head", "eagle"]
    else:
        (run / "eagle.pt").unlink()
    status, _, err = call(train.main, *tiny_run.flags, *more, "--out_dir", run)
    assert status == 2 and f"{path} was made by another version" in err, err
    assert err.count("\n") == 1


@pytest.mark.parametrize("lost", [["parts", "head", "the first"], ["step"]])
def test_unfinished_training_of_another_version_is_named(tmp_path, lost):
    def progress():
        parts = {"head": tiny_head("eagle", 1, tiny_target(), steps=0)}
        return Progress(tmp_path, "eagle", 5, {"seed": 1}, parts)

    progress().save()
    path = tmp_path / "eagle.progress.pt"
    checkpoint = load_checkpoint(path, KIND)
    first = next(iter(checkpoint["parts"]["head"]))
    without(checkpoint, *(first if name == "the first" else name for name in lost))
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match="was made by another version") as caught:
        progress()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["target", "training"])
@pytest.mark.parametrize("main", [train.main, ablation.main])
def test_a_damaged_head_beside_others_is_named(tiny_run, tmp_path, call, main, lost):
    """It was a KeyError after all the training."""
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    checkpoint = load_checkpoint(run / "eagle.pt", "draft head")
    without(checkpoint, lost)
    if main is train.main:
        path, argv = run / "eagle-other.pt", [*tiny_run.flags, "--head", "eagle"]
    else:
        path, argv = run / "ablation/eagle-k2-seed0.pt", ["--cells", "eagle-original"]
        argv += ["--seeds", 0, "--head_tokens", 100]
    save_checkpoint(path, checkpoint)
    status, _, err = call(main, *argv, "--out_dir", run)
    assert status == 2 and f"{path} was made by another version" in err and err.count("\n") == 1


def test_out_of_memory_is_not_another_version(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), as_other_version(tmp_path):
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(UserError, match="RuntimeError"), as_other_version(tmp_path):
        raise RuntimeError  # which says nothing


# ------------------------------------------------------------------------ numbers that are none


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_no_number_does_not_change_the_text(value, share, temperature):
    """NaN ranks above everything: the root fell out of its own tree, and 3 of 40 tokens were right.

    A chain that was drawn from NaN had tokens beyond the vocabulary.
    """
    target = tiny_target(seed=2)
    plans = [GrowingTree(8, 4, 3, CPU), GrowingTree(12, 2, 4, CPU)]
    plans += [fixed_tree(((0,), (1,), (0, 0)), CPU), Chain(4)]
    for kind in ("eagle", "medusa"):
        head = tiny_head(kind, 1, target, steps=20)
        torch.manual_seed(3)
        expand = head.expand

        def spoilt(*arguments, expand=expand):
            logits = expand(*arguments)
            return logits.masked_fill(torch.rand(logits.shape) < share, value)

        head.expand = spoilt
        for prompt in random_prompts(target, (2, 9)):
            for plan in plans[2:] if kind == "medusa" else plans:
                seeded = dict(temperature=temperature, seed=1)
                out = generate(target, prompt, 20, head=head, plan=plan, **seeded)
                if temperature == 0:
                    assert out.tokens == generate(target, prompt, 20).tokens
                assert all(0 <= token < target.config.vocab_size for token in out.tokens)
                assert len(out.tokens) in (20, target.config.context - len(prompt))


def test_a_target_that_diverged_is_not_saved(text_folder, tmp_path, call, monkeypatch):
    """It was saved as finished, and decoded to nonsense or an IndexError."""
    flags = [*TINY.split(), "--data", text_folder, "--head", "none", "--out_dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS["smoke"], "target_lr", 1e12)
        status, out, err = call(train.main, *flags)
    assert status == 2 and "the target diverged: try another --seed" in err
    assert not (tmp_path / "run" / "target.pt").exists()
    status, out, err = call(train.main, *flags)  # what it left does not stand in the way
    assert (status, err) == (0, "")


def test_a_target_that_overflows_is_refused_when_it_is_loaded(tiny_run, tmp_path, call):
    """Its weights are numbers, what it writes is none: token 0 for ever, or an IndexError."""
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    target, checkpoint = load_target(run / "target.pt")
    target.norm.weight.fill_(1e38)
    save_target(run / "target.pt", target, checkpoint["tokenizer"], checkpoint["training"])
    for temperature in ("0", "1"):
        argv = ["--out_dir", run, "--head", "none", "--device", "cpu", "--temperature", temperature]
        status, _, err = call(speculate.main, *argv)
        assert status == 2 and f"target of {run} writes no numbers" in err and err.count("\n") == 1


@pytest.mark.parametrize("large", [1e6, torch.nan])
def test_states_too_large_for_their_file_are_no_lesson(tmp_path, large):
    """A head that learnt from inf was told to have diverged."""
    target, windows = tiny_target().float(), torch.zeros(4, 9, dtype=torch.long)
    target.norm.weight.fill_(large)
    with pytest.raises(UserError, match=r"hold NaN, or values beyond 65,504"):
        Features(target, windows, nullcontext)
    written = Conversations(tmp_path / "texts", {"length": 8, "width": 4})
    with pytest.raises(UserError, match=r"beyond 65,504"):
        written.append(windows, windows > 0, torch.full((4, 8, 4), large), 1.0)
    assert Conversations(tmp_path / "texts", {"length": 8, "width": 4}).count == 0


# ------------------------------------------------------------------------------- text of all kinds


def test_file_names_that_are_no_utf8_are_read_like_any_other(tmp_path):
    """Their hash was a UnicodeEncodeError that named no file."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"line\nbreak.txt", b"back\\slash.txt", b"plain.txt"):
        with open(os.path.join(os.fsencode(folder), name), "w", encoding="utf-8") as file:
            file.write(f"{name!r} has a line like this one\n" * 2000)
    documents = read_paths([str(folder)])
    assert len({document.name.split("#")[0] for document in documents}) == 4
    for splits in (by_hash(documents), by_shares(documents)):
        assert sum(map(len, splits.values())) == len(documents)
        assert len(describe(splits, [str(folder)])["hash"]) == 16


def test_files_of_another_encoding_are_counted(tmp_path, capsys):
    """Half of a folder was passed over without a word."""
    (tmp_path / "utf8.txt").write_text("gr\u00fc\u00dfe\n" * 100, "utf-8")
    (tmp_path / "latin.txt").write_text("gr\u00fc\u00dfe\n" * 100, "latin-1")
    (tmp_path / "notepad.txt").write_text("gr\u00fc\u00dfe\n" * 100, "utf-16")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff" * 100)
    names = {document.name.split("#")[0] for document in read_paths([str(tmp_path)])}
    assert names == {"utf8.txt"}
    assert (
        "2 files passed over, such as latin.txt: not readable as UTF-8" in capsys.readouterr().out
    )


def test_the_same_text_by_two_names_is_read_once(tmp_path):
    """A link beside its file stood in training and in test."""
    (tmp_path / "a.txt").write_text("some text\n" * 300)
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "c.txt").write_text("some text\n" * 300)
    (tmp_path / "d.txt").write_text("other text\n" * 300)
    documents = read_paths([str(tmp_path)])
    assert {document.name.split("#")[0] for document in documents} == {"a.txt", "d.txt"}


def folder_of(path: Path, count: int, size: int, seed: int, lines: bool) -> list[str]:
    """`count` files of made-up words, of `size` characters on average, some much longer."""
    rng = random.Random(f"{count} {size} {seed} {lines}")
    for number in range(count):
        length = round(size * rng.choice([0.5, 0.8, 1.0, 1.7]))
        words = "".join(rng.choices("abcdefghijk  ", k=length))
        text = re.sub(r"(.{60})", r"\1\n", words) if lines else words
        (path / f"{rng.getrandbits(40):x}-{number}.txt").write_text(text)
    return [str(path)]


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("count, size", [(1, 200_000), (2, 150_000), (5, 60_000), (20, 20_000)])
@pytest.mark.parametrize("seed", range(3))
def test_every_part_has_its_share_however_few_and_long_the_files(
    tmp_path, count, size, seed, lines
):
    """By chance alone 64 of 100 folders of 20 files left a part empty, and were refused."""
    paths = folder_of(tmp_path, count, size, seed, lines)
    documents = read_paths(paths)
    found, by_chance = sizes(load_documents(paths)), sizes(by_hash(documents))
    total = sum(len(document.text) for document in documents)
    assert sum(found.values()) == total
    if min(by_chance.values()) >= LEAST:  # the split of runs that are there already
        assert found == by_chance
    else:
        assert all(0.025 * total <= found[part] <= 0.085 * total for part in ("valid", "test"))
    texts = {part: {d.text for d in members} for part, members in load_documents(paths).items()}
    assert not texts["train"] & (texts["valid"] | texts["test"])


def test_too_little_text_is_refused_by_the_part_that_lacks_it(tmp_path):
    with pytest.raises(UserError, match=r"characters of text in the (valid|test) part, at least"):
        load_documents(folder_of(tmp_path, 3, 10_000, 0, True))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0c", "\x1c"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompt_files_are_cut_at_line_breaks_alone(tmp_path, mark, bom, end):
    """`splitlines` breaks JSON at U+2028 and its like; a byte order mark was taken for JSON."""
    rows = [{"turns": [f"one{mark}two"]}, {"turns": ["three"], "category": f"c{mark}d"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for name in ("q.jsonl", "q.JSONL", "q.json"):
        (tmp_path / name).write_bytes((bom + end.join(lines) + end).encode())
        questions = from_file(tmp_path / name)
        assert [q.turns for q in questions] == [[f"one{mark}two"], ["three"]]
    (tmp_path / "q.txt").write_bytes((bom + f"one{mark}two{end}three{end}").encode())
    assert [q.turns for q in from_file(tmp_path / "q.txt")] == [[f"one{mark}two"], ["three"]]


@pytest.mark.parametrize("name", ["q.jsonl", "q.ndjson", "q.jsonlines"])
@pytest.mark.parametrize("place", ["turns", "category"])
def test_half_a_character_is_refused_by_its_line(tmp_path, place, name):
    """It could not be written with the results, once all was measured."""
    rows = [{"turns": ["a"], "category": "b"}, {"turns": ["c"], "category": "d"}]
    rows[1][place] = ["\ud800"] if place == "turns" else "e\ud800"
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"line 2 is no question: .*surrogates not allowed"):
        from_file(tmp_path / name)


def test_a_folder_whose_name_is_no_utf8_is_a_task_that_can_be_written(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"a.txt"), "w", encoding="utf-8") as file:
        file.write("a line of it\n" * 100)
    assert {document.task for document in read_paths([str(tmp_path)])} == {"caf\ufffd"}


def test_a_prompt_without_room_is_named(tmp_path):
    """The first of two refusals named it, and the second did not."""
    target, prompts = tiny_target(), [Passage("a", [1, 2]), None]
    target.chat = None
    for length, words in ((20, "there is room for 4 new tokens"), (24, "reads at most 23")):
        prompts[1] = Passage("b", [1] * length)
        with pytest.raises(UserError, match=rf"prompt 2 \('a passage'\): .*{words}"):
            check_prompts(SimpleNamespace(max_new_tokens=10), target, 4, prompts)


@pytest.mark.parametrize("category", [5, ["a"], {"a": 1}, True])
def test_a_category_that_is_no_text_is_refused_by_its_line(tmp_path, category):
    """It was a TypeError after everything was measured."""
    path = tmp_path / "q.jsonl"
    rows = [{"turns": ["a"], "category": None}, {"turns": ["b"], "category": category}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="line 2 is no question: its category is no text"):
        read_questions(path)


# ----------------------------------------------------------------------------------------- tokens

ADDED = {
    "name": "bpe",
    "pattern": PIECES,
    "tokens": [*map(chr, range(256)), "ab", "<think>", "    ", "<end>"],
    "special": {"<|endoftext|>": 259, "<end>": 259},
    "added": {"<think>": 257, "    ": 258},
}
ADDED["special"] = {"<|endoftext|>": 259}


def test_added_tokens_are_found_in_any_text_and_control_tokens_are_not():
    """`<think>` was eight tokens, in silence; and nobody may end a text by spelling its end."""
    encoding = build_encoding(ADDED)
    text = "ab<think>ab    ab<|endoftext|>"
    expected = [256, 257, 256, 258, 256, *b"<|endoftext|>"]
    assert encode(encoding, text) == expected
    assert tokenize(encoding, [text]).tolist() == [*expected, 259]
    assert encode(encoding, text.encode() + b"\xff") == [*expected, 255]
    assert encoding.decode(expected) == text


def test_a_text_too_long_for_tiktoken_is_refused(monkeypatch):
    """Its panic is no Exception: status 1, and a message of Rust's."""
    encoding = build_encoding(ADDED)

    class PanicException(BaseException):
        pass

    def panic(*arguments, **more):
        raise PanicException("StackOverflow")

    monkeypatch.setattr(type(encoding), "encode", panic)
    monkeypatch.setattr(type(encoding), "encode_batch", panic)
    for cut in (lambda: encode(encoding, "  "), lambda: tokenize(encoding, ["  "])):
        with pytest.raises(UserError, match="a run of alike characters is too long"):
            cut()


SCRIPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]  # the prompt is its first two tokens


@pytest.mark.parametrize(
    "stops, end", [({5, 9}, 5), ({9, 6}, 6), ({6}, 8), (set(), 16), ((8,), 12)]
)
def test_a_text_ends_at_any_of_several_tokens(stops, end):
    """Llama 3 has several, and went on after all but one."""
    for wrong in ((), (4,), (5, 7), range(16)):
        head = ScriptedHead(SCRIPT, wrong)
        request = dict(head=head, gamma=4, stop_token=stops)
        result = generate(ScriptedTarget(SCRIPT), SCRIPT[:2], 100, **request)
        assert result.tokens == SCRIPT[2:end]


# ----------------------------------------------------------------------------------- large windows


def test_the_causal_mask_is_the_causal_mask():
    rotary = Rotary(GPTConfig(context=24))
    square = torch.full((24, 24), -torch.inf).triu(1)
    for start in range(1, 24):
        for length in range(2, 24 - start + 1):
            assert rotary(start, length)[2].equal(square[start : start + length, : start + length])
    seen = torch.tensor([[True, False], [True, True]])
    tree = rotary.tree(5, torch.tensor([5, 6]), seen)[2]
    assert tree.equal(torch.zeros(2, 7).index_put((torch.tensor(0), torch.tensor(6)),
                                                  torch.tensor(-torch.inf)))  # fmt: skip


def test_the_causal_mask_does_not_grow_with_the_square_of_the_window():
    """At Llama 3.1's 131,072 it took 64 GiB, once for the target and once for each head."""
    shape = dict(vocab_size=8, num_layers=1, width=8, num_heads=1, num_kv_heads=1, mlp_width=8)
    target = GPT(GPTConfig(context=131_072, **shape))
    for model in (target, build_head(HeadConfig("eagle", 2), target)):
        buffers = {buffer.data_ptr(): buffer.numel() for buffer in model.buffers()}
        assert 2**17 < sum(buffers.values()) < 2**25


# -------------------------------------------------------------------------------------- interrupts


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_decoding_is_one_line_even_where_a_shell_ignored_it(name):
    """A shell starts what runs in its background with SIGINT ignored."""
    import signal

    root = Path(__file__).parent.parent
    words = [sys.executable, "-u", "speculate.py", "--head", "none", "--max_new_tokens", "400"]
    words += ["--device", "cpu", "--dtype", "float32", "--prompt", "x"]
    process = subprocess.Popen(
        words,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    process.stdout.readline()  # the run is named: main has begun
    time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "interrupted")


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "where",
    ["kill()", "note = weakref.ref(it := set(), lambda _: kill()); del it", "with mute: kill()"],
    ids=["plain", "in a callback", "where errors are dropped"],
)
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path, name, where):
    """It was a traceback of imports; and one of eight was dropped, and the script went on."""
    root, code = Path(__file__).parent.parent, "import contextlib, signal, weakref\n"
    code += f"kill = lambda: signal.raise_signal(signal.{name})\n"
    code += f"mute = contextlib.suppress(BaseException)\n{where}\n"
    (tmp_path / "slow.py").write_text(code)
    (tmp_path / "library.py").write_text("import plumbing.early, slow")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import plumbing.early, slow")
    path = {"PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
    for ours, *words in (
        (True, "-c", "import plumbing.early, slow; print('on')"),
        (False, "-c", "import library; print('on')"),  # who imports the project: his own signals
        (False, "-m", "other"),
    ):
        words = [sys.executable, *words]
        done = subprocess.run(words, env=os.environ | path, capture_output=True, text=True)
        if ours:
            assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
        else:
            assert "\ninterrupted" not in done.stderr and done.returncode != 130


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_an_interrupt_while_a_class_is_made_is_one_line():
    """torch imports parts of itself late. Python 3.11 makes a RuntimeError of an interrupt there."""
    code = """
import plumbing.early, signal
from plumbing.cli import run
class Slow:
    def __set_name__(self, owner, name):
        signal.raise_signal(signal.SIGINT)
run(lambda: type("Late", (), {"slow": Slow()}))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_after_the_imports_leaves_nothing_half_done(name):
    """During them the process just leaves; later what it has begun is put away first."""
    code = f"""
import plumbing.early, signal
from plumbing.cli import run
def main():
    try:
        signal.raise_signal(signal.{name})
    finally:
        print("put away")
run(main)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "put away\n", "\ninterrupted\n")


def test_interrupts_are_heard_from_the_first_import_on():
    root = Path(__file__).parent.parent
    for script in ("speculate.py", "train.py", "bench.py", "study/__init__.py"):
        tree = ast.parse((root / script).read_text("utf-8"))
        first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert ast.unparse(first) == "import plumbing.early", script


def test_speculate_reads_a_run_that_is_being_trained(tiny_run, tmp_path, call):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    with only_writer(run):
        argv = ["--out_dir", run, "--prompt", "def", "--max_new_tokens", 8, "--device", "cpu"]
        assert call(speculate.main, *argv)[0] == 0
