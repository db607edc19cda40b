"""Whole training runs: what they leave behind, and that an interrupt changes nothing.

A run that goes on after an interrupt has to be the run that was not interrupted, and a run that is
repeated with other settings must not pass for the old one: else no comparison of heads means
anything. All runs here are tiny, but train.py itself trains them.
"""

import csv
import json
import math
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import train
from costs import measure_acceptance
from plumbing.cli import UserError
from plumbing.curves import heads_table
from plumbing.files import load_checkpoint, stored
from plumbing.progress import Progress, check_same, is_due, schedule
from recipe import HEADS, PRESETS, TrainConfig
from speculate import generate
from targets.bpe import encode_prompt
from targets.features import VALID_WINDOWS, Features, evenly
from targets.loading import load
from targets.runs import fingerprint, load_head, load_target, trained_heads
from targets.small import bits_per_byte
from targets.text import Text
from targets.written import Conversations, Written, not_repeated
from train import HeadTraining

# ------------------------------------------------------------------------- progress, resuming


def count_up(
    progress: Progress, counter: torch.nn.Module, at: int | None = None, number=None
) -> None:
    """Add 1 in each step, and in step `at` be sent the signal of this number."""
    for step in progress:
        if step == at:
            os.kill(os.getpid(), number)
        with torch.no_grad():
            counter.weight += 1  # the interrupted step is still taken, once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_falls_between_two_steps_and_costs_none(tmp_path, number):
    handler = signal.getsignal(number)
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    with pytest.raises(KeyboardInterrupt, match="stands at step 3 of 5"):
        count_up(Progress(tmp_path, "c", 5, {"a": 1}, {"counter": counter}), counter, 2, number)
    assert counter.weight.item() == 3 and signal.getsignal(number) is handler
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    progress = Progress(tmp_path, "c", 5, {"a": 1}, {"counter": counter})
    assert progress.step == 3 and counter.weight.item() == 3
    count_up(progress, counter)
    assert counter.weight.item() == 5
    progress.finish()
    assert not list(tmp_path.glob("*.pt"))


def test_what_was_learnt_is_kept_until_the_result_is_written(tmp_path):
    """Between the last step and the checkpoint a target is evaluated: that, too, is interrupted."""
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    count_up(Progress(tmp_path, "c", 5, {}, {"counter": counter}), counter)
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    assert Progress(tmp_path, "c", 5, {}, {"counter": counter}).step == 5
    assert counter.weight.item() == 5


def test_progress_made_with_other_settings_is_refused(tmp_path):
    Progress(tmp_path, "c", 5, {"lr": 1}, {}).save()
    with pytest.raises(UserError, match="lr 1, now it is 2"):
        Progress(tmp_path, "c", 5, {"lr": 2}, {})


def test_the_best_weights_are_kept_as_they_were(tmp_path):
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    progress = Progress(tmp_path, "c", 5, {}, {})
    for score in (1.0, 3.0, 2.0, 3.0):
        with torch.no_grad():
            counter.weight += 1
        progress.keep_if_best(score, counter)
    assert progress.best["weight"].item() == 2 and progress.score == 3.0


@pytest.mark.parametrize("step_seconds, lines, foretold", [(0.05, 4, 0), (4.0, 30, 1)], ids=str)
def test_a_short_training_has_few_lines_and_a_long_one_says_how_long(
    tmp_path, monkeypatch, capsys, step_seconds, lines, foretold
):
    clock = [0.0]
    monkeypatch.setattr("plumbing.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("plumbing.progress.SAVE_SECONDS", math.inf)
    progress = Progress(tmp_path, "c", 90, {}, {})
    for step in progress:
        clock[0] += step_seconds
        if is_due(step, 90, 30):
            progress.log(100, loss=1.0)
    out = capsys.readouterr().out
    assert out.count(" min left") == lines and out.count("c: about 6 min\n") == foretold
    assert len(log_of(tmp_path / "c.csv")) == 30  # all of them, whatever is on the screen
    assert out.splitlines()[-1].split()[1:2] == ["90/90"] and "0.0 min left" in out


def test_shares_of_a_few_drafts_have_two_digits_and_their_number():
    valid = {"agree_1": 4 / 11, "agree_2": 3 / 11, "alpha_1": 0.3241, "tau_estimate": 1.46}
    settings = {"layers": 1, "adversarial_weight": 0.0, "head_data": "self"}
    record = {"name": "medusa", "settings": settings, "parameters": 1e6, "seconds": 60}
    for drafts, cells in ((11, "0.36, 0.27 (of 11) | 0.32 |"), (1000, "0.364, 0.273 | 0.324 |")):
        table = heads_table([record | {"valid": valid | {"drafts": drafts}}])
        assert cells in table


# ----------------------------------------------------------------------------- the tiny run


def weights_of(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def record_of(path) -> dict:
    return load_checkpoint(path, "draft head")["training"]


def assert_same_weights(one, other) -> None:
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def log_of(path) -> list[dict[str, str]]:
    """The rows of a log, without the only column that differs from run to run."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_leaves_target_heads_logs_and_nothing_half_done(tiny_run):
    names = {path.name for path in tiny_run.folder.iterdir()}
    expected = {f"{name}.{end}" for name in ["target", *HEADS] for end in ("pt", "csv")}
    assert names == expected | {"conversations", "heads.md", "training.png"}
    for name in HEADS:
        record = record_of(tiny_run.folder / f"{name}.pt")
        assert record["name"] == name and record["seconds"] > 0
        assert f"| {name} |" in (tiny_run.folder / "heads.md").read_text()


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_heads_of_a_kind_learn_from_equally_many_tokens_of_the_same_text(tiny_run, kind):
    """Else the comparison of KOALA with the original head would mean nothing."""
    one, other = (record_of(tiny_run.folder / f"{kind}{end}.pt") for end in ("", "-koala"))
    for key in ("steps", "tokens", "windows"):
        assert one[key] == other[key] > 0


def test_any_ending_of_a_heads_name_is_found_and_no_progress_is(tmp_path):
    for name in ("eagle-0.5.pt", "medusa.pt", "medusa.progress.pt", "target.pt", "eagle.csv"):
        (tmp_path / name).touch()
    assert trained_heads(tmp_path) == ["eagle-0.5", "medusa"]


def test_training_heads_leaves_the_target_as_it_was(tiny_run):
    assert (tiny_run.folder / "target.pt").read_bytes() == tiny_run.target_before_heads


def test_weights_are_kept_in_bfloat16_and_lose_nothing(tiny_run):
    """They were rounded before anything was measured; what needs float32 is kept in it."""
    for name in ("target", *HEADS):
        weights = torch.load(tiny_run.folder / f"{name}.pt", weights_only=True)["weights"]
        kinds = {w.dtype for w in weights.values() if w.is_floating_point()}
        assert kinds == {torch.bfloat16}, name
    target, checkpoint = load_target(tiny_run.folder / "target.pt")
    text = Text([str(tiny_run.data)], (), ("valid",))
    text.use(checkpoint["tokenizer"])
    held_out = text.windows("valid", target.config.context + 1).long()
    bits = bits_per_byte(target, held_out, text.byte_counts, nullcontext)
    assert bits == pytest.approx(checkpoint["training"]["valid_bits_per_byte"], rel=1e-6)
    assert fingerprint(target.bfloat16()) == checkpoint["fingerprint"]
    odd = torch.nn.Linear(3, 2)
    odd.weight.data[0, 0], odd.bias.data[:] = 1 / 3, 1.0
    kept = stored(odd)
    assert (kept["weight"].dtype, kept["bias"].dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(kept["weight"], odd.weight)


def test_training_teaches_something(tiny_run):
    target = load_checkpoint(tiny_run.folder / "target.pt", "target")["training"]
    assert target["valid_bits_per_byte"] < 4  # 8 is a coin toss for every bit
    losses = [float(row["loss_sup"]) for row in log_of(tiny_run.folder / "medusa.csv")]
    assert losses[-1] < 0.9 * losses[0]


def test_the_head_kept_is_the_one_that_drafted_best_on_validation_text(
    tiny_run, tmp_path, call, monkeypatch
):
    """Heads that are not rounded afterwards: their scores can be found again exactly."""
    monkeypatch.setattr(train, "round_weights", lambda module: None)
    folder, later = shutil.copytree(tiny_run.folder, tmp_path / "run"), 0
    names = [f"{name}-again" for name in ("medusa", "eagle")]
    for name in names:
        assert call(train.main, *tiny_run.flags, "--out_dir", folder, "--head", name)[0] == 0
    target, checkpoint = load_target(folder / "target.pt")
    text = Text([str(tiny_run.data)], (), ("valid",))
    text.use(checkpoint["tokenizer"])
    rows = evenly(text.windows("valid", target.config.context + 1), VALID_WINDOWS)
    about = {"target": checkpoint["fingerprint"], "length": 32, "width": 32}
    written = Conversations(folder / "conversations", about)
    valid = {
        "eagle": Features(target, rows, nullcontext),
        "medusa": Written(target, written, held_out=True),
    }
    for name in names:
        head, held_out = load_head(folder / f"{name}.pt", target), valid[name.split("-")[0]]
        batch = held_out.batch(evenly(torch.arange(len(held_out)), 64))
        measured = measure_acceptance(target, head, batch)["tau_estimate"]
        rows = [row["tau_estimate"] for row in log_of(folder / f"{name}.csv")]
        scores = [float(value) for value in rows if value]
        assert measured == pytest.approx(max(scores), abs=1e-5)
        # Its record was measured on all windows.
        whole = measure_acceptance(target, head, held_out.batch(torch.arange(len(held_out))))
        known = record_of(folder / f"{name}.pt")["valid"]["tau_estimate"]
        assert whole["tau_estimate"] == pytest.approx(known, abs=1e-5)
        later += scores[-1] < max(scores)
    assert later > 0, "in this run the last was always the best: the test says nothing"


@pytest.mark.parametrize("name", HEADS)
def test_medusa_learns_what_the_target_writes_and_eagle_the_corpus(tiny_run, name):
    used = record_of(tiny_run.folder / f"{name}.pt")["settings"]
    texts = {"medusa": ("self", "written_tokens"), "eagle": ("corpus", "head_data_tokens")}
    text, amount = texts[name.split("-")[0]]
    assert used["head_data"] == text
    assert {"written_tokens", "head_data_tokens"} & used.keys() == {amount}


def test_what_a_head_learns_from_can_be_chosen():
    for kind in ("medusa", "eagle"):
        for asked in ("corpus", "self"):
            assert TrainConfig(head_data=asked).of_head(kind).head_data == asked
        given = TrainConfig(target="model.gguf", preset="pretrained", head_data="self", data=["x"])
        assert given.of_head(kind).head_data == "corpus"
    assert TrainConfig().of_head("medusa").window == 128
    assert TrainConfig(target_context=96).of_head("medusa").window == 96
    assert TrainConfig(head_window=64).of_head("medusa").window == 64
    assert TrainConfig().of_head("eagle").window == 512


def test_only_the_joint_part_is_adversarial(tiny_run):
    for name in HEADS:
        rows = log_of(tiny_run.folder / f"{name}.csv")
        steps = int(rows[-1]["step"])
        assert steps == 8000 // 256  # --head_tokens, --batch_tokens
        played = [int(row["step"]) for row in rows if row.get("loss_adv")]
        expected = [int(r["step"]) for r in rows if int(r["step"]) > int(0.6 * steps)]
        assert played == (expected if name.endswith("-koala") else [])


@pytest.mark.parametrize(
    "interrupted, at", [("target", 4), ("eagle-koala", 5), ("eagle-koala", 25)]
)
def test_an_interrupted_run_ends_as_the_undisturbed_one(
    tiny_run, tmp_path, call, monkeypatch, interrupted, at
):
    """Step 5 is supervised, step 25 of 31 is joint: the discriminator's state counts there."""
    name = "eagle-koala"
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", name]
    if interrupted != "target":
        (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)

    def schedule_with_interrupt(step: int, steps: int) -> float:
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(step, steps)

    with monkeypatch.context() as patch:
        for module in ("train", "targets.small"):
            patch.setattr(f"{module}.schedule", schedule_with_interrupt)
        status, _, err = call(train.main, *argv)
    assert status == 130 and f"{interrupted} stands at step {at + 1} of" in err
    assert (tmp_path / f"{interrupted}.progress.pt").is_file()
    assert not (tmp_path / f"{interrupted}.pt").exists()
    status, out, _ = call(train.main, *argv)
    assert status == 0 and f"{interrupted}: going on at step {at + 1}" in out
    for run in ("target", name):
        assert_same_weights(tmp_path / f"{run}.pt", tiny_run.folder / f"{run}.pt")
    for log in tmp_path.glob("*.csv"):  # and every loss on the way
        assert log_of(log) == log_of(tiny_run.folder / log.name)
    assert not list(tmp_path.glob("*.progress.pt"))


def test_an_interrupt_while_the_discriminator_learns_alone_is_heeded_at_once(
    tiny_run, tmp_path, call, monkeypatch
):
    """Beside a large target its steps alone take minutes. They begin anew, and end the same."""
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle-koala"]
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    step, calls = HeadTraining.joint_step, []

    def interrupted(training, batch, part, *more):
        figures = step(training, batch, part, *more)
        if part == "D alone":
            calls.append(batch)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(HeadTraining, "joint_step", interrupted)
        status, _, err = call(train.main, *argv)
    assert status == 130 and len(calls) == 2 and "eagle-koala stands at step 18 of 31" in err
    status, out, err = call(train.main, *argv)
    assert status == 0 and "eagle-koala: going on at step 18" in out, err
    assert_same_weights(tmp_path / "eagle-koala.pt", tiny_run.folder / "eagle-koala.pt")


def test_a_head_that_diverged_is_not_kept(tiny_run, tmp_path, call):
    """Where all its logits are nan its first choice is some token, now and then the right one."""
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle", "--head_lr", "1e30"]
    status, _, err = call(train.main, *argv)
    assert status == 2 and "eagle diverged: try a lower --head_lr" in err
    assert not (tmp_path / "eagle.pt").exists()


@pytest.mark.parametrize("name", ["target", "eagle"])
def test_training_does_not_go_on_in_another_dtype(name, tiny_run, tmp_path, call, monkeypatch):
    """By --dtype auto it could be, since that measures anew each time."""
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle"]
    if name != "target":
        (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)

    def interrupt(step: int, steps: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return schedule(step, steps)

    with monkeypatch.context() as patch:
        for module in ("train", "targets.small"):
            patch.setattr(f"{module}.schedule", interrupt)
        assert call(train.main, *argv)[0] == 130
    status, _, err = call(train.main, *argv, "--dtype", "bfloat16")
    assert status == 2 and f"{name}.progress.pt" in err and "dtype in use torch.float32" in err


def test_the_discriminator_changes_a_head_through_its_loss_only(tiny_run, tmp_path, call):
    """With a lambda that underflows D is trained beside, and the head is that of lambda = 0."""
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    for name, weight in (("eagle-none", "0"), ("eagle-tiny", "1e-60"), ("eagle-one", "1")):
        argv = ["--head", name, "--layers", "2", "--adversarial_weight", weight]
        argv += ["--joint_from", "0"]
        status, out, err = call(train.main, *tiny_run.flags, "--out_dir", tmp_path, *argv)
        assert status == 0, err
    assert_same_weights(tmp_path / "eagle-none.pt", tmp_path / "eagle-tiny.pt")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "eagle-none.pt", tmp_path / "eagle-one.pt")


def test_the_discriminator_learns_alone_before_it_joins(tiny_run, tmp_path, call):
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    found = []
    for d_steps in ("0", "80"):
        name = f"eagle-{d_steps}"
        argv = ["--head", name, "--adversarial_weight", "1", "--discriminator_steps", d_steps]
        status, _, err = call(train.main, *tiny_run.flags, "--out_dir", tmp_path, *argv)
        assert status == 0, err
        joint = [row for row in log_of(tmp_path / f"{name}.csv") if row["share_found"]]
        found.append(float(joint[0]["share_found"]))
    assert found[0] < found[1]


def test_the_same_command_again_changes_nothing(tiny_run, call):
    files = sorted(tiny_run.folder.glob("*.pt")) + sorted(tiny_run.folder.glob("*.csv"))
    before = [file.read_bytes() for file in files]
    status, out, _ = call(train.main, *tiny_run.flags, "--out_dir", tiny_run.folder)
    assert status == 0 and out.count("trained already") == 4 and "target: there already" in out
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--target_tokens", "30000"], ["target.pt", "target_tokens"]),
        (["--seed", "7"], ["target.pt", "seed"]),
        (["--head_lr", "0.1"], ["medusa.pt", "head_lr"]),
        (["--head", "eagle-koala", "--layers", "3"], ["eagle-koala.pt", "layers"]),
        (
            ["--head", "medusa-koala", "--adversarial_weight", "0.7"],
            ["medusa-koala.pt", "adversarial_weight"],
        ),
    ],
)
def test_other_settings_are_refused_by_name(tiny_run, call, flags, names):
    status, _, err = call(train.main, *tiny_run.flags, "--out_dir", tiny_run.folder, *flags)
    assert status == 2 and all(name in err for name in names)
    assert err.startswith("error:") and err.count("\n") == 1


@pytest.mark.parametrize(
    "setting, file",
    [("target_lr", "target.pt"), ("target_heads", "target.pt"), ("own_from", "medusa.pt")],
)
def test_other_settings_without_a_flag_are_refused_too(tiny_run, call, monkeypatch, setting, file):
    """A preset can change them, or Python: the files that there are were made with the old ones."""
    monkeypatch.setitem(PRESETS["smoke"], setting, 0.1 if setting != "target_heads" else 4)
    status, _, err = call(train.main, *tiny_run.flags, "--out_dir", tiny_run.folder)
    assert status == 2 and file in err and f"with {setting} " in err and err.count("\n") == 1


def test_text_that_has_changed_is_noticed(tiny_run, call):
    file = tiny_run.data / "fables" / "00.txt"
    text = file.read_text()
    try:
        file.write_text("!" + text[1:])
        status, _, err = call(train.main, *tiny_run.flags, "--out_dir", tiny_run.folder)
    finally:
        file.write_text(text)
    assert status == 2 and "text" in err


def test_check_same_names_what_differs(tmp_path):
    check_same(tmp_path, {"a": 1, "b": 2}, {"a": 1})
    with pytest.raises(UserError, match="with b 2, now it is 3"):
        check_same(tmp_path, {"a": 1, "b": 2}, {"a": 1, "b": 3})


def test_the_trained_target_is_frozen(tiny_run):
    target, _ = load_target(tiny_run.folder / "target.pt")
    assert not any(p.requires_grad for p in target.parameters())


# -------------------------------------------------------------- text that the target writes


@pytest.fixture(scope="module")
def self_taught(tiny_run, tmp_path_factory):
    """A head trained on what the target wrote, and its command: (folder, argv)."""
    folder = tmp_path_factory.mktemp("self-taught")
    (folder / "target.pt").write_bytes(tiny_run.target_before_heads)
    argv = [*tiny_run.flags, "--out_dir", str(folder), "--head", "eagle", "--head_data", "self"]
    argv += ["--draft_vocab", "60", "--own_steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("targets.written.ON_CPU", 20)
        patch.setattr("sys.argv", ["train.py", *argv])
        train.main()
    return folder, argv


@pytest.fixture
def copied(self_taught, tmp_path, monkeypatch):
    """A copy of that run for one test alone: (folder, argv)."""
    folder, argv = self_taught
    monkeypatch.setattr("targets.written.ON_CPU", 20)
    copy = shutil.copytree(folder, tmp_path / "run")
    return copy, [str(copy) if word == str(folder) else word for word in argv]


def written_in(folder) -> Conversations:
    about = {"target": load_checkpoint(folder / "target.pt", "target")["fingerprint"]}
    return Conversations(folder / "conversations", about | {"length": 32, "width": 32})


def test_a_head_learns_from_the_written_texts_that_are_not_held_out(self_taught):
    folder, _ = self_taught
    record, written = record_of(folder / "eagle.pt"), written_in(folder)
    assert written.count == 140  # the first 20, 40, .. that hold --written_tokens 4000
    assert record["windows"] == written.count - 7  # one in HELD_OUT is never learnt from
    assert record["tokens"] == record["steps"] * 256 and record["steps"] == 8000 // 256
    assert record["seconds"] > 0
    to_learn = not_repeated(written.tokens)
    to_learn[:, :16] = False  # half is an opening
    assert torch.equal(written.learn, to_learn)


def test_the_same_command_writes_nothing_more_and_changes_nothing(self_taught, call):
    folder, argv = self_taught
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".pt", ".json", "")]
    before = [path.read_bytes() for path in files if path.is_file()]
    status, out, err = call(train.main, *argv)
    assert status == 0 and "eagle: trained already" in out, err
    assert [path.read_bytes() for path in files if path.is_file()] == before


def test_text_written_by_other_rules_is_not_reused(copied, call, monkeypatch):
    _, argv = copied
    monkeypatch.setattr("targets.written.TEXTS", "older")
    status, _, err = call(train.main, *argv, "--head", "eagle-later")
    assert status == 2 and "was written with rules" in err and "Traceback" not in err


def test_a_head_that_comes_later_learns_from_the_same_texts(copied, call):
    """Or it would be compared with heads that have learnt from other ones."""
    folder, argv = copied
    status, out, err = call(train.main, *argv, "--head", "eagle-later")
    assert status == 0 and " texts of " not in out, err
    assert_same_weights(folder / "eagle-later.pt", folder / "eagle.pt")
    status, out, err = call(train.main, *argv, "--head", "eagle-later")
    assert status == 0 and "eagle-later: trained already" in out, err


def test_text_that_was_removed_is_written_anew(copied, call):
    """And it is the same text: what it says is a function of the settings alone."""
    folder, argv = copied
    before = written_in(folder).tokens.clone()
    shutil.rmtree(folder / "conversations")
    status, out, err = call(train.main, *argv, "--head", "eagle-later")
    assert status == 0 and " texts of " in out, err
    assert torch.equal(written_in(folder).tokens, before)
    assert_same_weights(folder / "eagle-later.pt", folder / "eagle.pt")


# ------------------------------------------------------- a head that begins as another (--init)


def keep_the_last(progress: Progress, score, module, step=None) -> None:
    progress.best_step, progress.best = 1, {k: v.clone() for k, v in module.state_dict().items()}


def test_a_head_goes_on_from_another_ones_weights_and_with_more_text(copied, call, monkeypatch):
    """At a learning rate of 0 a head stays what it was, so that is what it went on from."""
    folder, argv = copied
    argv += ["--init", str(folder / "eagle.pt"), "--written_tokens", "8000", "--head"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "schedule", lambda step, steps: 0.0)
        status, _, err = call(train.main, *argv, "eagle-still")
        assert status == 0, err
        patch.setattr(Progress, "keep_if_best", keep_the_last)
        status, _, err = call(train.main, *argv, "eagle-last")
        assert status == 0, err
    for name in ("eagle-still", "eagle-last"):
        assert_same_weights(folder / f"{name}.pt", folder / "eagle.pt")
    first, second = record_of(folder / "eagle.pt"), record_of(folder / "eagle-still.pt")
    assert second["kept_step"] == 0 < first["kept_step"]  # nothing was better than what there was
    assert second["windows"] > 1.8 * first["windows"]
    assert second["settings"]["init"] == str(folder / "eagle.pt") and second["log"]
    # And at an ordinary one it learns on.
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "keep_if_best", keep_the_last)
        status, _, err = call(train.main, *argv, "eagle-more")
    assert status == 0, err
    with pytest.raises(AssertionError):
        assert_same_weights(folder / "eagle-more.pt", folder / "eagle.pt")


def test_further_training_does_not_make_a_head_worse(copied, call, monkeypatch):
    """After steps that taught it nothing good, it is the head it was."""
    folder, argv = copied
    monkeypatch.setattr(train, "schedule", lambda step, steps: 1e3)
    argv += ["--init", str(folder / "eagle.pt"), "--written_tokens", "8000"]
    status, _, err = call(train.main, *argv, "--head", "eagle-more")
    assert status == 0, err
    assert_same_weights(folder / "eagle-more.pt", folder / "eagle.pt")
    assert record_of(folder / "eagle-more.pt")["kept_step"] == 0


def test_the_vocabulary_comes_with_the_weights(copied, call, monkeypatch):
    """The same rows of weights for other tokens would be another head, and no error."""
    folder, argv = copied
    argv += ["--head_data", "corpus", "--head_data_tokens", "4000", "--head"]
    assert call(train.main, *argv, "eagle-fresh")[0] == 0
    trainings, step = [], HeadTraining.joint_step

    def noted(training, *more):
        trainings.append(training)
        return step(training, *more)

    monkeypatch.setattr(HeadTraining, "joint_step", noted)
    monkeypatch.setattr(Progress, "keep_if_best", keep_the_last)
    argv += ["eagle-more", "--init", str(folder / "eagle.pt"), "--adversarial_weight", "0.1"]
    status, out, err = call(train.main, *argv)
    assert status == 0 and "eagle-more: guesses 60 tokens" in out, err
    fresh, old, new = (
        weights_of(folder / f"{name}.pt")["vocabulary.tokens"]
        for name in ("eagle-fresh", "eagle", "eagle-more")
    )
    assert torch.equal(old, new) and not torch.equal(old, fresh)
    # The target's p, and what the discriminator scores, are of these tokens too.
    rows = trainings[0].target.lm_head.weight[old]
    assert torch.equal(trainings[0].lm_head, rows)
    assert torch.equal(trainings[0].discriminator.score(torch.eye(33)[:32]).T, rows)


@pytest.mark.parametrize(
    "init, flags, said",
    [
        ("first_edition/eagle", [], "was trained for another target"),
        ("eagle-koala", [], "has another shape"),
        ("medusa", [], "has another shape"),
        ("eagle", ["--layers", "2"], "has another shape"),
        ("eagle", ["--draft_vocab", "60"], "has another shape"),
        ("target", [], "is not the checkpoint of a draft head"),
        ("eagle-nowhere", [], "there is no draft head at"),
    ],
)
def test_a_head_that_does_not_fit_is_nothing_to_begin_from(
    tiny_run, tmp_path, call, init, flags, said
):
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    folder = Path(__file__).parent if init.startswith("first_edition") else tiny_run.folder
    path = folder / f"{init}.pt"
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle-more", "--init", path]
    status, _, err = call(train.main, *argv, *flags)
    assert status == 2 and said in err and str(path) in err
    assert err.startswith("error:") and err.count("\n") == 1
    assert not list(tmp_path.glob("eagle-more*"))


def test_further_training_that_was_interrupted_goes_on_as_that(copied, call, monkeypatch):
    """Neither from the weights it began with again, nor as the training of a new head."""
    folder, argv = copied
    argv += ["--init", str(folder / "eagle.pt"), "--head"]

    def schedule_with_interrupt(step: int, steps: int) -> float:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(step, steps)

    monkeypatch.setattr(Progress, "keep_if_best", keep_the_last)
    assert call(train.main, *argv, "eagle-whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "schedule", schedule_with_interrupt)
        status, _, err = call(train.main, *argv, "eagle-more")
    assert status == 130 and "eagle-more stands at step 4" in err
    status, _, err = call(train.main, *argv[:-3], "--head", "eagle-more")
    assert status == 2 and "eagle-more.progress.pt was trained with init" in err
    status, out, err = call(train.main, *argv, "eagle-more")
    assert status == 0 and "eagle-more: going on at step 4" in out, err
    assert " texts of " not in out
    assert_same_weights(folder / "eagle-more.pt", folder / "eagle-whole.pt")
    with pytest.raises(AssertionError):
        assert_same_weights(folder / "eagle-more.pt", folder / "eagle.pt")
    status, out, err = call(train.main, *argv, "eagle-more")
    assert status == 0 and "eagle-more: trained already" in out, err


# ----------------------------------------------------------------- a run of the first edition

FIRST_EDITION = Path(__file__).parent / "first_edition"
EXPECTED = json.loads((FIRST_EDITION / "expected.json").read_text())  # and how it was made
# The flags it was made with, by their present names.
FLAGS = "--preset smoke --device cpu --dtype float32 --target_vocab 300 --target_context 32"
FLAGS += " --target_layers 1 --target_width 16 --batch_tokens 256 --target_tokens 20000"
FLAGS += " --head_data_tokens 4000 --written_tokens 4000 --head_tokens 8000"
FLAGS += " --discriminator_steps 3 --data text --out_dir run"


@pytest.fixture
def first_edition(tmp_path, text_folder, monkeypatch) -> list[str]:
    """The working directory has a copy of that run and of its text; the flags it was made with."""
    shutil.copytree(FIRST_EDITION, tmp_path / "run")
    shutil.copytree(text_folder, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS["smoke"], "target_mlp_width", 16)
    return FLAGS.split()


@pytest.mark.parametrize("name", EXPECTED["heads"])
def test_a_head_of_the_first_edition_drafts_as_it_did(first_edition, name):
    """A weight that is read under another name, or is no longer used, would only draft worse."""
    target, head, encoding = load("run", name, "cpu", "float64")
    prompt, before = EXPECTED["prompt"], EXPECTED["heads"][name]
    assert encode_prompt(encoding, "The old cat likes a small river. Then")[:20] == prompt
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        hidden, state = target(tokens[:, :-1]), head.start(40)
        head.absorb(state, tokens[:, 1:], hidden)
        drafted, own = head.expand(state)[0, 0, :6].tolist(), target.lm_head(hidden[0, -1])
    assert drafted == pytest.approx(before["logits"], rel=1e-9)
    assert own[:6].tolist() == pytest.approx(EXPECTED["target_logits"], rel=1e-9)
    text = generate(target, prompt, 11, head=head)
    assert (text.tokens, text.produced) == (before["tokens"], before["produced"])
    sampled = generate(target, prompt, 11, temperature=1.0, seed=1).tokens
    assert sampled == EXPECTED["plain_sampled"]


def test_a_run_of_the_first_edition_can_be_measured(first_edition, call):
    """With its text, which has to be split as it was: else it is measured on what it learnt."""
    Path("prompts.txt").write_text("The cat\nA dog sees\nThe old river\n", encoding="utf-8")
    argv = "--out_dir run --prompts_file prompts.txt --runs 1 --max_new_tokens 12 --sizes 4 4x6"
    status, out, err = call(bench.main, *argv.split(), "--heads", *EXPECTED["heads"])
    assert (status, err) == (0, "")
    result = json.loads(Path("run/bench/bench.json").read_text(encoding="utf-8"))
    assert set(result["on_held_out_text"]) == set(EXPECTED["heads"])
    for name in EXPECTED["heads"]:
        assert f"{name} tree 4x6" in result["methods"] and name in out
        assert result["samples"][0]["methods"][name]["produced"]


def test_heads_of_the_first_edition_are_trained_already_and_others_join_them(first_edition, call):
    """A setting that is lost with its old name would have them trained again, or be refused."""
    files = sorted(Path("run").glob("*.pt"))
    before = [file.read_bytes() for file in files]
    status, out, err = call(train.main, *first_edition)
    assert (status, err) == (0, "") and "target: there already" in out
    for name in ("medusa-koala", "eagle", "eagle-koala"):
        assert f"{name}: trained already" in out
    assert out.count("trained already") == 3 and Path("run/medusa.pt").is_file()
    assert [file.read_bytes() for file in files] == before
    table = Path("run/heads.md").read_text(encoding="utf-8")
    assert all(f"| {name} | " in table for name in ["medusa", *EXPECTED["heads"]])
    target, head, _ = load("run", "medusa", "cpu", "float64")
    plain = generate(target, EXPECTED["prompt"], 11).tokens
    assert generate(target, EXPECTED["prompt"], 11, head=head).tokens == plain


@pytest.mark.parametrize("name", ["eagle", "eagle-koala", "medusa-koala"])
def test_a_head_is_trained_as_the_first_edition_trained_it(first_edition, call, name):
    """By its log: same batches and noise, same start, same losses, and the game in the same steps.

    Machines round differently: to the supervised loss that matters little, to the game more.
    """
    kind, *koala = name.split("-")
    again = "-".join([kind, "again", *koala])
    status, _, err = call(train.main, *first_edition, "--head", again)
    assert status == 0, err
    old, new = record_of(f"run/{name}.pt"), record_of(f"run/{again}.pt")
    assert old["steps"] == new["steps"] and old["parameters"] == new["parameters"]
    close = {"step": 0, "tokens": 0, "tau_estimate": 0.02, "loss_adv": 0.05, "d_loss": 0.02}
    close |= dict.fromkeys(["alpha_1", "alpha_2", "alpha_3", "alpha_4"], 1e-3)
    # Other noise on EAGLE's input is 2e-4. The text that Medusa learns from is drawn by rounded p.
    close["loss_sup"] = 5e-5 if kind == "eagle" else 1e-3
    for before, now in zip(old["log"], new["log"], strict=True):
        assert before.keys() == now.keys() - {"cosine_of_p"}  # which is of the second edition
        assert ("d_loss" in now) == (name.endswith("koala") and now["step"] > 18)
        for key in close.keys() & now.keys():
            assert now[key] == pytest.approx(before[key], rel=close[key]), (now["step"], key)


def test_a_head_goes_on_from_one_of_the_first_edition(first_edition, call, monkeypatch):
    """Its weights have to mean what they meant: at a learning rate of 0 they stay, but rounded."""
    monkeypatch.setattr(train, "schedule", lambda step, steps: 0.0)
    monkeypatch.setattr(Progress, "keep_if_best", keep_the_last)
    argv = [*first_edition, "--head", "eagle-more", "--init", "run/eagle.pt"]
    status, _, err = call(train.main, *argv)
    assert status == 0, err
    more, before = weights_of("run/eagle-more.pt"), weights_of("run/eagle.pt")
    assert more.keys() == before.keys()
    assert all(torch.equal(more[name], before[name].bfloat16()) for name in more)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--target_layers", "2"], "run/target.pt was trained with target_layers 1, now it is 2"),
        (["--head", "eagle", "--own_steps", "3"], "run/eagle.pt was trained with own_steps 1"),
        (["--head", "eagle", "--head_window", "16"], "was trained with head_window None, now it"),
        (["--head", "eagle-koala", "--joint_from", "0.5"], "was trained with joint_from 0.6, now"),
    ],
)
def test_other_settings_than_those_of_the_first_edition_are_refused(
    first_edition, call, flags, said
):
    """By their present names: a setting that is not translated would pass unseen."""
    status, _, err = call(train.main, *first_edition, *flags)
    assert status == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, file, flags",
    [
        ("eagle-unfinished", "eagle-unfinished.progress.pt", []),
        ("eagle-rounds", "eagle-rounds.pt", ["--draft_vocab", "64"]),
        ("eagle-rounds", "eagle-rounds.pt", []),
    ],
)
def test_what_only_the_first_edition_can_go_on_with_is_refused(
    first_edition, call, name, file, flags
):
    """In a line that tells where to; half a training must not count as one, nor be begun anew."""
    before = (Path("run") / file).read_bytes()
    status, _, err = call(train.main, *first_edition, "--head", name, *flags)
    assert status == 2 and f"run/{file}" in err and "commit 70beb28" in err
    assert err.startswith("error:") and err.count("\n") == 1
    assert (Path("run") / file).read_bytes() == before
    assert name == "eagle-rounds" or not Path(f"run/{name}.pt").exists()


def test_a_damaged_progress_file_is_none_of_the_first_edition(tmp_path):
    (tmp_path / "c.progress.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="c.progress.pt is damaged"):
        Progress(tmp_path, "c", 5, {}, {})


def test_a_head_is_judged_in_the_end_on_all_held_out_text(tiny_run, tmp_path, call, monkeypatch):
    """On the way some windows of it have to do; and its minutes end before that."""
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    monkeypatch.setattr(train, "EVALUATED", 5)
    counts, measure = [], train.measure_acceptance

    def noted(target, head, batch, **more):
        counts.append((len(batch.tokens), more))
        return measure(target, head, batch, **more)

    monkeypatch.setattr(train, "measure_acceptance", noted)
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle"]
    status, _, err = call(train.main, *argv)
    assert status == 0, err
    *during, (last, more) = counts
    assert more == {"by_rank": True} and last > 64 and len(during) >= 10


def test_a_large_vocabulary_reads_more_than_the_standard_library(monkeypatch, tmp_path, call):
    asked = []

    def noted(paths, packages):
        asked.append(packages)
        raise UserError("that will do")

    monkeypatch.setattr(train, "read_text", noted)
    for vocab in ("2048", "8192"):
        flags = ["--preset", "smoke", "--out_dir", tmp_path / "run", "--target_vocab", vocab]
        assert call(train.main, *flags)[0] == 2
    assert asked == [(), ("torch", "numpy", "matplotlib")]
