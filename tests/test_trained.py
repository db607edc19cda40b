"""What comes with the code works at once, under any Python, and nothing is ever written beside it.

The rules are tried on copies of the tiny run; the shipped files themselves come last.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import speculate
import train
from plumbing.cli import UserError
from plumbing.files import load_checkpoint, save_checkpoint
from recipe import HEADS, KOALA_WEIGHT, LAB, PRESETS, TrainConfig, usual_preset
from speculate import generate
from study import prompts
from targets.bpe import encode_prompt
from targets.loading import TRAINED, find_run, load, results_folder
from targets.outputs import NEAR_TIE, is_loop, same_or_not
from targets.text import Document

SPEAK = ["cat", "--max_new_tokens", "12", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def came_along(tiny_run, tmp_path, monkeypatch) -> Path:
    """A copy of the tiny run as trained/cpu, seen from an empty folder."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "code" / "trained" / "cpu")
    (folder / "prompts.jsonl").write_text('{"category": "a", "turns": ["The cat"]}\n')
    monkeypatch.setattr("targets.loading.TRAINED", folder.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------ which run is taken


def test_your_newest_run_with_a_head_is_taken_else_the_one_that_came_along(came_along):
    def run(name: str, age: int, head: bool = True) -> Path:
        folder = Path("out") / name
        folder.mkdir(parents=True)
        for file in ["target.pt", *(["eagle.pt"] if head else [])]:
            (folder / file).touch()
            os.utime(folder / file, (1e9 - age, 1e9 - age))
        return folder

    assert find_run(None) == came_along and find_run("some/where") == Path("some/where")
    run("smoke", 0)
    alone = run("unfinished", 1, head=False)
    assert find_run(None) == came_along and find_run(None, needs_head=False) == alone
    assert find_run(None, chat=True) == came_along  # which says that it cannot talk
    talks = came_along.parent / "smollm2"
    talks.mkdir()
    (talks / "target.json").touch()
    run("smollm2", 0, head=False)  # read for the one that came along
    assert find_run(None, needs_head=False) == alone
    assert find_run(None, chat=True) == talks and find_run(None) == came_along
    older, newest = run("older", 9), run("newest", 5)
    assert find_run(None) == newest
    os.utime(older / "eagle.pt", (1e9, 1e9))  # a head of today beside a target of last week
    assert find_run(None) == older


def test_of_your_own_runs_the_newest_chat_model_talks(came_along):
    """A newer one of a target without conversations is passed over."""
    target = load_checkpoint(came_along / "target.pt", "target")
    for age, name in enumerate(("small", "talks", "talked")):
        folder = Path("out") / name
        tokenizer = target["tokenizer"] | ({} if name == "small" else {"chat": {}})
        save_checkpoint(folder / "target.pt", target | {"tokenizer": tokenizer})
        (folder / "eagle.pt").touch()
        os.utime(folder / "eagle.pt", (2e9 - age, 2e9 - age))
    assert find_run(None) == Path("out/small") and find_run(None, chat=True) == Path("out/talks")


def test_the_run_that_came_along_decodes_from_anywhere_and_stays_as_it_is(came_along, call):
    before = hashes(came_along)
    status, out, err = call(speculate.main, *SPEAK)
    assert (status, err) == (0, "")
    first, second = out.splitlines()[:2]
    assert first.startswith("run trained/cpu (came with the code), head eagle-koala")
    assert "--out_dir" in second and "train.py" in second
    target, head, _ = load(head="medusa", dtype="float32")
    assert head.training_record["name"] == "medusa"
    assert generate(target, [1, 2], 4, head=head).tokens == generate(target, [1, 2], 4).tokens
    assert not list(Path().iterdir())

    Path("some.txt").write_text("The cat\nA dog sees\n", encoding="utf-8")
    argv = ["--prompts_file", "some.txt", "--max_new_tokens", 8, "--runs", 1, "--heads", "eagle"]
    status, out, err = call(bench.main, *argv)
    assert (status, err) == (0, "")
    assert Path("out/trained-cpu/bench/bench.json").is_file()
    assert hashes(came_along) == before
    assert results_folder(Path("out/mine")) == Path("out/mine")


def test_nothing_is_trained_or_marked_beside_what_came_along(
    came_along, tiny_run, call, monkeypatch
):
    before = hashes(came_along)
    status, _, err = call(train.main, *tiny_run.flags, "--out_dir", came_along, "--head", "eagle-x")
    assert status == 2 and "--preset lab" in err
    monkeypatch.setattr("study.prompts.from_documents.__defaults__", (12,))
    monkeypatch.setattr(prompts, "CANDIDATES", 3)
    status, _, err = call(prompts.main, "--device", "cpu", "--dtype", "float32")
    assert (status, err) == (0, "") and Path("out/trained-cpu/prompts.jsonl").is_file()
    assert hashes(came_along) == before


def test_the_head_taken_is_koalas_or_the_runs_first(came_along):
    assert load(dtype="float32")[1].training_record["name"] == "eagle-koala"
    (came_along / "eagle-koala.pt").unlink()
    assert load(dtype="float32")[1].training_record["name"] == "eagle"
    with pytest.raises(UserError, match="trained here: eagle, medusa, medusa-koala"):
        load(head="eagle-koala")


# ------------------------------------------------------------------------------ a head in minutes


@pytest.mark.parametrize(
    "argv, preset",
    [
        ("", "cpu"),
        ("--target x", "pretrained"),
        ("--head none", "cpu"),
        ("--head eagle-mine --layers 3", "lab"),
        ("--head=eagle-mine", "lab"),
        ("--head eagle --out_dir out/mine", "cpu"),
        ("--head eagle --data text", "cpu"),
        ("--head eagle --target_layers 8", "cpu"),
    ],
)
def test_a_single_head_goes_beside_the_target_that_came_along(argv, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usual_preset(argv.split()) == preset
    Path("out/cpu").mkdir(parents=True)
    Path("out/cpu/target.pt").touch()  # there is a target of your own
    assert usual_preset(argv.split()) == ("cpu" if preset == "lab" else preset)
    Path("out/lab").mkdir()
    Path("out/lab/eagle-mine.progress.pt").touch()  # begun there: the same command goes on
    assert usual_preset(argv.split()) == preset


def test_the_lab_trains_one_layer_and_two_beside_the_target(
    came_along, tiny_run, call, monkeypatch
):
    unflagged = {
        k: v for k, v in PRESETS["smoke"].items() if k in ("target_heads", "target_mlp_width")
    }
    monkeypatch.setitem(PRESETS, "lab", PRESETS["lab"] | unflagged)
    flags = tiny_run.flags[2:]
    assert tiny_run.flags[:2] == ["--preset", "smoke"]
    status, out, err = call(train.main, "--preset", "lab", *flags, "--seed", 3)
    assert (status, err) == (0, "")
    assert out.index("came with the code") < out.index("eagle ")
    assert hashes(Path("out/lab"))["target.pt"] == hashes(came_along)["target.pt"]
    records = [load("out/lab", name, dtype="float32")[1].training_record for name in LAB]
    assert [record["settings"]["layers"] for record in records] == [1, 2]
    assert {record["settings"]["adversarial_weight"] for record in records} == {0}
    Path("some.txt").write_text(
        "The cat\nA dog sees\n", encoding="utf-8"
    )  # and both heads are compared
    argv = ["--prompts_file", "some.txt", "--max_new_tokens", 8, "--runs", 1]
    assert "heads eagle, eagle-k2" in call(bench.main, *argv)[1]
    assert hashes(Path("out/lab"))["prompts.jsonl"] == hashes(came_along)["prompts.jsonl"]
    argv = ["--preset", "lab", *flags, "--target_layers", "2"]
    status, _, err = call(train.main, *argv)
    assert status == 2 and "target_layers 1, now it is 2" in err
    assert find_run(None) == Path("out/lab")


def test_a_heads_name_tells_its_layers_and_lambda():
    names = {"eagle": 1, "eagle-koala": 2, "eagle-k3": 3, "eagle-mine": 1, "medusa-k12": 12}
    names |= {"eagle-koala-2": 2, "eagle-Koala": 2, "eagle-koala-k3": 3, "eagle-k2-again": 2}
    for name, layers in names.items():
        weight = KOALA_WEIGHT if "koala" in name.lower() else 0.0
        assert TrainConfig(head=name).layers_and_weight(name) == (layers, weight)
    assert TrainConfig(head="eagle-k3", layers=4).layers_and_weight("eagle-k3") == (4, 0.0)


# ------------------------------------------------------------------------------ under any Python


def library(word: str) -> list[Document]:
    """A standard library of prose; of another `word` in each release."""
    texts = [f"{word} entry {i} tells of {i * i} things. " * 40 for i in range(200)]
    return [Document(f"topics/{i}", f"topics/{i}", text, "docs") for i, text in enumerate(texts)]


def test_another_pythons_library_is_told_and_given_text_refused(
    tiny_run, tmp_path, call, monkeypatch
):
    """As after an update of Python: the text has another hash, its split is the same."""
    at = tiny_run.flags.index("--data")
    flags = [*tiny_run.flags[:at], *tiny_run.flags[at + 2 :], "--out_dir", tmp_path / "run"]
    monkeypatch.setattr("targets.text.standard_library", lambda: library("old"))
    assert call(train.main, *flags, "--head", "eagle")[0] == 0
    monkeypatch.setattr("targets.text.standard_library", lambda: library("new"))
    told = "text: the target learnt from other versions than those here"
    status, out, err = call(train.main, *flags, "--head", "eagle-more")
    assert (status, err) == (0, "") and out.count(told) == 1
    monkeypatch.setattr("study.prompts.from_documents.__defaults__", (16,))
    argv = ["--out_dir", tmp_path / "run", "--num_prompts", 2, "--max_new_tokens", 8]
    status, out, err = call(bench.main, *argv, "--runs", 1, "--temperature", 1)
    assert (status, err) == (0, "") and out.count(told) == 1

    data = shutil.copytree(tiny_run.data, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    flags = [*tiny_run.flags[:at], "--data", "text", "--out_dir", "mine"]
    assert call(train.main, *flags, "--head", "eagle")[0] == 0
    changed = next(data.rglob("*.txt"))
    changed.write_text(changed.read_text() + "More.")
    assert call(train.main, *flags, "--head", "eagle-more")[0] == 2
    status, _, err = call(bench.main, "--out_dir", "mine", "--max_new_tokens", 8)
    assert status == 2 and "the text has changed" in err


# ------------------------------------------------------------------------------ marked passages


def test_a_run_keeps_its_passages_and_is_measured_on_them(tiny_run, tmp_path, call, monkeypatch):
    monkeypatch.setattr("study.prompts.from_documents.__defaults__", (12,))
    monkeypatch.setattr(prompts, "MARKED_TOKENS", 16)
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    argv = ["--out_dir", folder, "--device", "cpu", "--dtype", "float32"]
    status, out, err = call(prompts.main, *argv)
    assert (status, err) == (0, ""), err
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    target, _, encoding = load(folder, None, "cpu", "float32")
    assert {row["split"] for row in rows} == {"valid", "test"}
    assert {row["category"] for row in rows} == {"fables", "letters"}
    for row in rows[:6]:
        tokens = encode_prompt(encoding, row["turns"][0])
        assert len(tokens) == 12
        assert row["loop"] == is_loop(generate(target, tokens, 16).tokens)
    status, out, err = call(bench.main, *argv, "--num_prompts", 3, "--runs", 1, "--heads", "eagle")
    assert status == 0, err
    samples = json.loads((folder / "bench/bench.json").read_text())["samples"]
    texts = [row["turns"][0] for row in rows if row["split"] == "test"]
    assert all(encoding.decode(sample["prompt"]) in texts for sample in samples)


@pytest.mark.parametrize(
    "temperature, tokens, decoded", [(0.0, 6, 5), (0.0, 7, 12), (0.5, 6, 12)], ids=str
)
def test_of_marked_loops_only_a_few_are_decoded(
    tiny_run, monkeypatch, temperature, tokens, decoded
):
    """Where the mark holds: for greedy texts of that length."""
    target, _, _ = load(tiny_run.folder, None, "cpu", "float32")
    made = []

    def counted(target, prompt, *more, **request):
        made.append(prompt)
        return generate(target, prompt, *more, **request)

    monkeypatch.setattr(prompts, "generate", counted)
    monkeypatch.setattr(prompts, "MARKED_TOKENS", 6)
    monkeypatch.setattr(prompts, "is_loop", lambda tokens: made[-1][0] == 1)
    candidates = [prompts.Passage("a", [1, 2, number + 3], True) for number in range(8)]
    candidates += [prompts.Passage("a", [2, 2, number + 3]) for number in range(4)]
    config = bench.BenchConfig(num_prompts=4, max_new_tokens=tokens, temperature=temperature)
    chosen, counts = prompts.choose_prompts(config, target, candidates)
    assert len(made) == decoded and counts == {"candidates": 12, "looped": 8}
    assert [prompt.tokens[0] for prompt in chosen] == [2, 2, 2, 2, 1]


def test_where_texts_loop_against_their_mark_marked_passages_step_in(tiny_run, monkeypatch):
    """In bfloat16 half of the texts looped that were free of loops in float32: too few were left."""
    target, _, _ = load(tiny_run.folder, None, "cpu", "float32")
    monkeypatch.setattr(prompts, "MARKED_TOKENS", 6)
    monkeypatch.setattr(prompts, "is_loop", lambda tokens: tokens[0] == 1)
    texts = []

    def written(target, prompt, *more, **request):
        texts.append(prompt[0])
        return SimpleNamespace(tokens=[prompt[0], 3, 3])

    monkeypatch.setattr(prompts, "generate", written)
    candidates = [prompts.Passage("a", [2, 2, number + 3], True) for number in range(8)]
    candidates += [prompts.Passage("a", [first, 2, 3]) for first in (1, 2, 1, 2)]
    config = bench.BenchConfig(num_prompts=4, max_new_tokens=6)
    chosen, counts = prompts.choose_prompts(config, target, candidates)
    assert texts == [1, 2, 1, 2, 2, 2] and counts == {"candidates": 12, "looped": 8}
    assert [prompt.conversation for prompt in chosen] == [9, 11, 0, 1, 8]


# ------------------------------------------------------------------------------ the first words


class Certain:
    """A target whose logits after any text are these."""

    def __init__(self, logits: list[float]):
        self.logits = torch.tensor(logits)
        self.embed = torch.nn.Embedding(1, 1)

    def __call__(self, tokens):
        return torch.zeros(1, tokens.shape[1], 1)

    def lm_head(self, hidden):
        return self.logits


def test_two_outputs_are_identical_or_part_within_rounding_or_are_a_bug():
    target = Certain([2.0, 2.0 - NEAR_TIE[torch.float32] / 2, 0.5])
    assert same_or_not(target, [0], [0, 1], [0, 1]) == "the two outputs are identical"
    said = same_or_not(target, [0], [0, 0, 1, 0], [0, 0, 0, 0])
    assert "the same up to token 2;" in said and "tie (gap 0.0005)" in said
    assert "after token 2, at a clear choice (gap 1.5): a bug" in same_or_not(
        target, [0], [0, 0, 2], [0, 0, 0]
    )


def test_a_loop_and_a_draft_that_does_not_pay_are_said(came_along, call, monkeypatch):
    for loop, slow in ((True, None), (False, "drafting cannot pay here")):
        monkeypatch.setattr(speculate, "is_loop", lambda tokens, loop=loop: loop)
        monkeypatch.setattr(speculate, "remark", lambda *timed, slow=slow: slow)
        out = call(speculate.main, *SPEAK)[1]
        assert ("the text ends in a loop" in out) == loop
        assert ("drafting cannot pay here" in out) == (slow is not None)


@pytest.mark.parametrize("flags, warned", [("", False), ("--nodes 8", False)], ids=str)
def test_a_tree_is_no_worse_than_a_chain_where_text_is_greedy(came_along, call, flags, warned):
    out = call(speculate.main, *SPEAK, *flags.split())[1]
    assert ("at temperature 1" in out) == warned


def test_a_tree_that_the_temperature_ruins_is_warned_of(came_along, call, monkeypatch):
    monkeypatch.setattr("costs.expected_tau", lambda head, gamma, nodes, _: 2.0 if nodes else 3.0)
    for flags, warned in (("--temperature 1 --nodes 8", True), ("--temperature 1", False)):
        out = call(speculate.main, *SPEAK, *flags.split())[1]
        assert ("a chain of 4 reaches tau 3.00" in out) == warned
    monkeypatch.setattr("costs.expected_tau", lambda head, gamma, nodes, _: 3.0 if nodes else 2.0)
    assert "reaches tau" not in call(speculate.main, *SPEAK, "--temperature", 1, "--nodes", 8)[1]
    monkeypatch.setattr("costs.expected_tau", lambda head, gamma, nodes, _: 2.0 if nodes else 3.0)
    assert "reaches tau" not in call(speculate.main, *SPEAK, "--temperature", 0.3, "--nodes", 8)[1]


# ------------------------------------------------------------------------------ the shipped files

SHIPPED = sorted(TRAINED.glob("*/*.pt"))


def test_every_shipped_file_is_what_its_checksum_says():
    lines = (TRAINED / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    about = ("README.md", "SHA256SUMS")
    assert listed == {name: h for name, h in hashes(TRAINED).items() if name not in about}
    assert sum((TRAINED / name).stat().st_size for name in listed) <= 50 << 20
    assert {"cpu/target.pt", "cpu/eagle.pt", "cpu/eagle-koala.pt", "cpu/prompts.jsonl"} <= set(
        listed
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_file_has_its_record_and_is_in_bfloat16(path):
    kind = "target" if path.stem == "target" else "draft head"
    checkpoint = load_checkpoint(path, kind)
    record = checkpoint["training"]
    assert record["origin"]["command"].startswith("python train.py")
    assert record["origin"]["commit"] and not record["origin"]["commit"].endswith("+")
    assert record["seconds"] > 0 and record["settings"]
    weights = checkpoint["weights"].values()
    assert {w.dtype for w in weights if w.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("name", HEADS)
def test_the_shipped_run_decodes_exactly(name):
    """In float64, where no rounding can part the two texts."""
    target, head, encoding = load(TRAINED / "cpu", name, "cpu", "float64")
    tokens = encoding.encode("def read_file(path):")
    plain = generate(target, tokens, 16)
    drafted = generate(target, tokens, 16, head=head)
    assert drafted.tokens == plain.tokens
    assert drafted.acceptance_length > 1.2  # it is real text, and its drafts are


def test_the_shipped_passages_are_those_of_held_out_text():
    rows = prompts.read_questions(TRAINED / "cpu" / "prompts.jsonl")
    encoding = load(TRAINED / "cpu", None, "cpu", "float32")[2]
    for split in ("valid", "test"):
        of_split = [row for row in rows if row.split == split]
        assert {row.category for row in of_split} == {"code", "docs", "docstring"}
        assert sum(not row.loop for row in of_split) >= 30
    assert {len(encode_prompt(encoding, row.turns[0])) for row in rows} == {prompts.PROMPT_TOKENS}
    # A few passages begin alike; the text of one is the text of the other.
    assert len({row.turns[0] for row in rows}) > 0.99 * len(rows)
