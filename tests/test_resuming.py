"""Whole training runs: what they leave behind, and that an interrupt changes nothing.

A run that goes on after an interrupt has to be the run that was not interrupted, and a run that is
repeated with other settings must not pass for the old one: else no comparison of heads means
anything. All runs here are tiny, but train.py itself trains them.
"""

import csv
import os
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import train
import train_target
from budget import KINDS, TRAINING, WRITING, Budget, Seconds, step_seconds
from cli import UserError
from features import Features, Text, measure_acceptance, spread
from head_training import HeadTraining
from model import load_checkpoint, load_target
from recipe import HEADS, TrainConfig
from runs import load_head, trained_heads
from selfwritten import Conversations, Written, news
from stage import Stage, check_same, schedule

# ---------------------------------------------------------------------------- stage, resuming


def count_up(stage: Stage, counter: torch.nn.Module, at: int | None = None, number=None) -> None:
    """Add 1 in each step, and in step `at` be sent the signal of this number."""
    for step in stage:
        if step == at:
            os.kill(os.getpid(), number)
        with torch.no_grad():
            counter.weight += 1  # the interrupted step is still taken, once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_falls_between_two_steps_and_costs_none(tmp_path, number):
    handler = signal.getsignal(number)
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    with pytest.raises(KeyboardInterrupt, match="stands at step 3 of 5"):
        count_up(Stage(tmp_path, "c", 5, {"a": 1}, {"counter": counter}), counter, 2, number)
    assert counter.weight.item() == 3 and signal.getsignal(number) is handler
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    stage = Stage(tmp_path, "c", 5, {"a": 1}, {"counter": counter})
    assert stage.step == 3 and counter.weight.item() == 3
    count_up(stage, counter)
    assert counter.weight.item() == 5
    stage.finish()
    assert not list(tmp_path.glob("*.pt"))


def test_what_was_learnt_is_kept_until_the_result_is_written(tmp_path):
    """Between the last step and the checkpoint a target is evaluated: that, too, is interrupted."""
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    count_up(Stage(tmp_path, "c", 5, {}, {"counter": counter}), counter)
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    assert Stage(tmp_path, "c", 5, {}, {"counter": counter}).step == 5
    assert counter.weight.item() == 5


def test_progress_made_with_other_settings_is_refused(tmp_path):
    Stage(tmp_path, "c", 5, {"lr": 1}, {}).save()
    with pytest.raises(UserError, match="lr 1, now it is 2"):
        Stage(tmp_path, "c", 5, {"lr": 2}, {})


def test_the_best_weights_are_kept_as_they_were(tmp_path):
    counter = torch.nn.Embedding(1, 1, _weight=torch.zeros(1, 1))
    stage = Stage(tmp_path, "c", 5, {}, {})
    for score in (1.0, 3.0, 2.0, 3.0):
        with torch.no_grad():
            counter.weight += 1
        stage.keep_if_best(score, counter)
    assert stage.best["weight"].item() == 2 and stage.score == 3.0


# ----------------------------------------------------------------------------- the tiny run


def weights_of(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def assert_same_weights(one, other) -> None:
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def log_of(path) -> list[dict[str, str]]:
    """The rows of a log, without the only column that differs from run to run."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_leaves_target_heads_logs_and_nothing_half_done(tiny_run):
    names = {path.name for path in tiny_run.folder.iterdir()}
    expected = {f"{name}.{end}" for name in ["target", *HEADS] for end in ("pt", "csv")}
    assert names == expected | {"conversations", "heads.md", "training.png"}
    for name in HEADS:
        record = load_checkpoint(tiny_run.folder / f"{name}.pt", "draft head")["training"]
        assert record["name"] == name and record["seconds"] > 0
        assert f"| {name} |" in (tiny_run.folder / "heads.md").read_text()


def test_any_ending_of_a_heads_name_is_found_and_no_progress_is(tmp_path):
    for name in ("eagle-0.5.pt", "medusa.pt", "medusa.progress.pt", "target.pt", "eagle.csv"):
        (tmp_path / name).touch()
    assert trained_heads(tmp_path) == ["eagle-0.5", "medusa"]


def test_training_heads_leaves_the_target_as_it_was(tiny_run):
    assert (tiny_run.folder / "target.pt").read_bytes() == tiny_run.target_before_heads


def test_training_teaches_something(tiny_run):
    target = load_checkpoint(tiny_run.folder / "target.pt", "target")["training"]
    assert target["valid_bits_per_byte"] < 4  # 8 is a coin toss for every bit
    losses = [float(row["loss_sup"]) for row in log_of(tiny_run.folder / "medusa.csv")]
    assert losses[-1] < 0.9 * losses[0]


def test_the_head_kept_is_the_one_that_drafted_best_on_validation_text(tiny_run):
    folder, later = tiny_run.folder, 0
    target, checkpoint = load_target(folder / "target.pt")
    text = Text([str(tiny_run.data)], (), ("valid",))
    text.use(checkpoint["tokenizer"])
    rows = spread(text.windows("valid", target.config.context + 1), train.VALID_WINDOWS)
    about = {"target": checkpoint["fingerprint"], "length": 32, "width": 32}
    written = Conversations(folder / "conversations", about)
    valid = {
        "eagle": Features(target, rows, 1.0, nullcontext),
        "medusa": Written(target, written, held_out=True),
    }
    for name in HEADS:
        head, held_out = load_head(folder / f"{name}.pt", target), valid[name.split("-")[0]]
        measured = measure_acceptance(target, head, held_out, count=64)["tau_estimate"]
        rows = [row["tau_estimate"] for row in log_of(folder / f"{name}.csv")]
        scores = [float(value) for value in rows if value]
        assert measured == pytest.approx(max(scores), abs=1e-5)
        later += scores[-1] < max(scores)
    assert later > 0, "in this run the last was always the best: the test says nothing"


@pytest.mark.parametrize("name", HEADS)
def test_medusa_learns_what_the_target_writes_and_eagle_the_corpus(tiny_run, name):
    used = load_checkpoint(tiny_run.folder / f"{name}.pt", "draft head")["training"]["settings"]
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
    assert TrainConfig().of_head("medusa").head_window == 128
    assert TrainConfig(context=96).of_head("medusa").head_window == 96
    assert TrainConfig(window=64).of_head("medusa").head_window == 64
    assert TrainConfig().of_head("eagle").head_window == 512


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
        for module in (train, train_target):
            patch.setattr(module, "schedule", schedule_with_interrupt)
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
    """Beside a large target its steps alone take minutes; they begin anew then, and end the same."""
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle-koala"]
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    alone, calls = HeadTraining.discriminator_alone, []

    def interrupted(training, batch):
        calls.append(alone(training, batch))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(HeadTraining, "discriminator_alone", interrupted)
        status, _, err = call(train.main, *argv)
    assert status == 130 and len(calls) == 2 and "eagle-koala stands at step 18 of 31" in err
    status, out, err = call(train.main, *argv)
    assert status == 0 and "eagle-koala: going on at step 18" in out, err
    assert_same_weights(tmp_path / "eagle-koala.pt", tiny_run.folder / "eagle-koala.pt")


def test_a_head_that_diverged_is_not_kept(tiny_run, tmp_path, call):
    """Its first choice is some token even where all its logits are nan, and now and then the right one."""
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle", "--head_lr", "1e30"]
    status, _, err = call(train.main, *argv)
    assert status == 2 and "eagle diverged: try a lower --head_lr" in err
    assert not (tmp_path / "eagle.pt").exists()


@pytest.mark.parametrize("stage", ["target", "eagle"])
def test_a_stage_is_not_gone_on_with_in_another_dtype(stage, tiny_run, tmp_path, call, monkeypatch):
    """By --dtype auto it could be, since that measures anew each time."""
    argv = [*tiny_run.flags, "--out_dir", tmp_path, "--head", "eagle"]
    if stage != "target":
        (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)

    def interrupt(step: int, steps: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return schedule(step, steps)

    with monkeypatch.context() as patch:
        for module in (train, train_target):
            patch.setattr(module, "schedule", interrupt)
        assert call(train.main, *argv)[0] == 130
    status, _, err = call(train.main, *argv, "--dtype", "bfloat16")
    assert status == 2 and f"{stage}.progress.pt" in err and "dtype in use torch.float32" in err


def test_the_discriminator_changes_a_head_through_its_loss_only(tiny_run, tmp_path, call):
    """With a lambda that underflows D is trained beside, and the head is that of lambda = 0."""
    (tmp_path / "target.pt").write_bytes(tiny_run.target_before_heads)
    for name, weight in (("eagle-none", "0"), ("eagle-tiny", "1e-60"), ("eagle-one", "1")):
        argv = ["--head", name, "--layers", "2", "--adversarial_weight", weight]
        argv += ["--supervised_share", "0"]
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
    assert status == 0 and out.count("trained already") == 5
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--target_lr", "0.1"], ["target.pt", "target_lr"]),
        (["--seed", "7"], ["target.pt", "seed"]),
        (["--head_lr", "0.1"], ["medusa.pt", "head_lr"]),
        (["--head", "eagle-koala", "--layers", "3"], ["eagle-koala.pt", "layers"]),
        (["--koala_weight", "0.7"], ["medusa-koala.pt", "adversarial_weight"]),
    ],
)
def test_other_settings_are_refused_by_name(tiny_run, call, flags, names):
    status, _, err = call(train.main, *tiny_run.flags, "--out_dir", tiny_run.folder, *flags)
    assert status == 2 and all(name in err for name in names)
    assert err.startswith("error:") and err.count("\n") == 1


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


# --------------------------------------------------------------------------------- by minutes

COSTS = {name: Seconds(0.01 * (i + 1), 1.0 * i) for i, name in enumerate(HEADS)}


def new_budget(folder, complete: bool = False, **flags) -> Budget:
    flags = dict(minutes=10.0, context=32, batch_tokens=256) | flags
    return Budget(TrainConfig(out_dir=str(folder), **flags), lambda rounds: complete)


def not_again(name: str):
    raise AssertionError(f"{name} is measured again")


def test_heads_of_a_kind_learn_from_equally_many_tokens_in_the_time_there_is(tmp_path):
    """Else the comparison of KOALA with the original head would mean nothing."""
    budget = new_budget(tmp_path)
    budget.share_out(list(HEADS), COSTS.get)
    for kind, share in KINDS.items():
        names = [name for name in HEADS if name.startswith(kind)]
        tokens = {budget.head_tokens(name) for name in names}
        assert len(names) == 2 and len(tokens) == 1
        steps = tokens.pop() / 256
        seconds = sum(COSTS[name].once + steps * COSTS[name].step for name in names)
        assert seconds == pytest.approx(600 * TRAINING * share, rel=0.01)
    assert sum(KINDS.values()) == pytest.approx(1) and WRITING + TRAINING < 1


def test_the_same_command_does_not_measure_again(tmp_path):
    """Else a run that was interrupted would go on as another one, and be refused."""
    budget = new_budget(tmp_path)
    budget.share_out(list(HEADS), COSTS.get)
    again = new_budget(tmp_path, minutes=99.0)  # minutes are for rounds to come
    again.share_out(list(HEADS), not_again)
    assert [again.head_tokens(name) for name in HEADS] == [
        budget.head_tokens(name) for name in HEADS
    ]
    assert again.round == 1


def test_a_head_that_comes_later_is_measured_then(tmp_path):
    first = new_budget(tmp_path)
    first.share_out(["eagle"], COSTS.get)
    later, measured = new_budget(tmp_path), []
    later.share_out(list(HEADS), lambda name: measured.append(name) or COSTS[name])
    assert measured == ["medusa", "medusa-koala"]
    assert later.head_tokens("eagle-koala") == first.head_tokens("eagle")


def test_a_kind_that_comes_later_goes_through_the_rounds_of_the_others(tmp_path):
    new_budget(tmp_path, minutes=10.0).share_out(["eagle"], COSTS.get)
    more = new_budget(tmp_path, complete=True, more=True, minutes=30.0)
    more.share_out(["eagle"], COSTS.get)
    measured = []
    more.share_out(["medusa"], lambda name: measured.append(name) or COSTS[name])
    assert measured == ["medusa"]  # once for both rounds
    for name in ("eagle", "medusa"):
        first, second = (more.head_tokens(name, number) for number in (1, 2))
        assert second == pytest.approx(3 * first, rel=0.02)


class Timed:
    """A HeadTraining whose steps take as long as they are said to."""

    def __init__(self, clock: list, **settings):
        settings = dict(context=64, batch_tokens=64, own_steps=3) | settings
        self.config, self.clock = TrainConfig(**settings), clock
        self.weight, self.discriminator, self.head = 0.1, object(), torch.nn.Identity()

    def start(self, train):
        self.lesson = lambda batch: batch

    def step(self, batch, joint, own_steps, rate):
        self.clock[0] += {(0, 1): 1.0, (0, 3): 3.0, (1, 1): 10.0, (1, 3): 30.0}[joint, own_steps]

    def discriminator_alone(self, batch):
        self.clock[0] += 2.0


@pytest.mark.parametrize(
    "settings, step",
    [
        (dict(own_from=0.6, supervised_share=0.6), 0.6 * 1 + 0.4 * 30),
        (dict(own_from=0.8, supervised_share=0.5), 0.5 * 1 + 0.3 * 10 + 0.2 * 30),
        (dict(own_from=0.5, supervised_share=0.8), 0.5 * 1 + 0.3 * 3 + 0.2 * 30),
        (dict(own_from=1.0, supervised_share=0.0), 10.0),
    ],
)
def test_a_step_costs_what_its_sorts_cost_by_their_shares(settings, step, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("budget.time.perf_counter", lambda: clock[0])
    train = SimpleNamespace(windows=[0], batch=lambda index: index)
    seconds = step_seconds(Timed(clock, **settings), train, lambda head: None)
    assert seconds.step == pytest.approx(step) and seconds.once == pytest.approx(2.0 * 200)


def test_a_budget_too_small_still_trains_a_little(tmp_path):
    budget = new_budget(tmp_path, minutes=1e-6)
    budget.share_out(list(HEADS), COSTS.get)
    assert budget.head_tokens("eagle") == 10 * 256


def test_writing_ends_when_its_share_of_the_time_is_over_or_heads_have_begun(tmp_path):
    budget = new_budget(tmp_path)
    assert not budget.enough(10**6, 600 * WRITING - 0.1) and budget.enough(0, 600 * WRITING)
    budget.share_out(list(HEADS), COSTS.get)
    assert budget.enough(1, 0.0)  # what they learn from must not change under them
    assert not budget.enough(0, 0.0)  # unless somebody has removed it
    more = new_budget(tmp_path, complete=True, more=True, minutes=5.0)
    assert more.enough(0, 900 * WRITING) and not more.enough(0, 900 * WRITING - 0.1)
    # EAGLE, which learns from the corpus here, is no reason to write nothing for Medusa.
    (tmp_path / "eagle first").mkdir()
    later = new_budget(tmp_path / "eagle first")
    later.share_out(["eagle"], COSTS.get)
    assert not later.enough(0, 0.0)


def test_a_round_follows_when_asked_for_and_when_the_last_one_is_complete(tmp_path):
    asked = []

    def budget(complete: bool, more: bool) -> Budget:
        config = TrainConfig(out_dir=str(tmp_path), minutes=10.0, more=more)
        return Budget(config, lambda rounds: asked.append(rounds) or complete)

    rounds = [budget(*state).round for state in [(True, True), (True, False), (False, True)]]
    assert rounds == [1, 1, 1] and asked == [1]
    begun = budget(True, True)
    assert begun.round == 2 and begun.rounds[1]["tokens"] == {}
    # Interrupted before any head was complete, --more goes on with it.
    assert [budget(False, True).round, budget(False, False).round] == [2, 2]
    assert budget(True, True).round == 3 and asked == [1, 1, 2, 2]


def test_without_minutes_the_amounts_are_those_of_the_flags(tmp_path):
    flags = dict(minutes=None, head_tokens=5000, written_tokens=3200, more=True)
    budget = new_budget(tmp_path, complete=True, **flags)
    budget.share_out(list(HEADS), not_again)
    assert budget.head_tokens("eagle") == 5000 and budget.round == 1
    assert budget.enough(3200, 0.0) and not budget.enough(3199, 1e9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7"])
def test_a_damaged_budget_is_refused(tmp_path, content):
    (tmp_path / "budget.json").write_text(content)
    with pytest.raises(UserError, match="budget.json is damaged"):
        new_budget(tmp_path)


@pytest.fixture(scope="module")
def rounds(tiny_run, tmp_path_factory):
    """A head trained by minutes on what the target wrote, and its command: (folder, argv)."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "target.pt").write_bytes(tiny_run.target_before_heads)
    argv = [*tiny_run.flags, "--out_dir", str(folder), "--head", "eagle", "--head_data", "self"]
    argv += ["--minutes", "0.01", "--draft_vocab", "100", "--own_steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfwritten.ON_CPU", 20)
        patch.setattr("sys.argv", ["train.py", *argv])
        train.main()
    return folder, argv


def test_a_run_by_minutes_writes_and_learns_for_so_long(rounds):
    folder, _ = rounds
    record = load_checkpoint(folder / "eagle.pt", "draft head")["training"]
    (entry,) = record["rounds"]
    about = {"target": load_checkpoint(folder / "target.pt", "target")["fingerprint"]}
    written = Conversations(folder / "conversations", about | {"length": 32, "width": 32})
    assert written.seconds >= 0.6 * WRITING and written.count % 20 == 0
    assert entry["windows"] == written.count - -(-written.count // 20)  # the others are held out
    assert entry["tokens"] % 256 == 0 and entry["seconds"] > 0
    assert entry["tau_estimate"] == record["valid"]["tau_estimate"]
    to_learn = news(written.tokens)
    to_learn[:, :16] = False  # half is an opening
    assert torch.equal(written.learn, to_learn)


def test_the_same_command_by_minutes_changes_nothing(rounds, call):
    folder, argv = rounds
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".pt", ".json", "")]
    before = [path.read_bytes() for path in files if path.is_file()]
    status, out, err = call(train.main, *argv)
    assert status == 0 and "eagle: trained already" in out, err
    assert [path.read_bytes() for path in files if path.is_file()] == before


def test_text_written_by_other_rules_is_not_gone_on_with(rounds, call, monkeypatch):
    folder, argv = rounds
    monkeypatch.setattr(train, "TEXTS", "older")
    status, _, err = call(train.main, *argv, "--more")
    assert status == 2 and "was written with rules" in err and "Traceback" not in err


def test_more_goes_on_with_the_old_weights_and_more_text(rounds, call, monkeypatch, tmp_path):
    """At a learning rate of 0 the head stays what it was, so that is what it went on from."""
    folder, argv = rounds
    argv = [str(tmp_path / "run") if word == str(folder) else word for word in argv]
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr("selfwritten.ON_CPU", 20)
    with monkeypatch.context() as patch:
        patch.setattr(train, "schedule", lambda step, steps: 0.0)
        status, _, err = call(train.main, *argv, "--more")
    assert status == 0, err
    assert_same_weights(tmp_path / "run" / "eagle.pt", folder / "eagle.pt")
    second = load_checkpoint(tmp_path / "run" / "eagle.pt", "draft head")["training"]
    first = load_checkpoint(folder / "eagle.pt", "draft head")["training"]
    assert second["rounds"][:1] == first["rounds"] and len(second["rounds"]) == 2
    assert second["rounds"][1]["windows"] > first["rounds"][0]["windows"]
    assert second["settings"]["round"] == 2
    assert second["kept_step"] == 0  # nothing was better than what there was
    tokens = [row["tokens"] for row in second["log"]]
    assert second["log"][: len(first["log"])] == first["log"] and tokens == sorted(tokens)
    assert tokens[-1] == sum(entry["tokens"] for entry in second["rounds"])
    # And at an ordinary one it learns on.
    monkeypatch.setattr(Stage, "keep_if_best", keep_the_last)
    status, _, err = call(train.main, *argv, "--more")
    assert status == 0, err
    third = load_checkpoint(tmp_path / "run" / "eagle.pt", "draft head")["training"]
    assert len(third["rounds"]) == 3 and third["seconds"] > second["seconds"]
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run" / "eagle.pt", folder / "eagle.pt")


def keep_the_last(stage: Stage, score, module, step=None) -> None:
    stage.best_step, stage.best = 1, {k: v.clone() for k, v in module.state_dict().items()}


def test_more_training_does_not_make_a_head_worse(rounds, call, monkeypatch, tmp_path):
    """After a round that taught it nothing good, it is the head it was."""
    folder, argv = rounds
    argv = [str(tmp_path / "run") if word == str(folder) else word for word in argv]
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr("selfwritten.ON_CPU", 20)
    monkeypatch.setattr(train, "schedule", lambda step, steps: 1e3)
    status, _, err = call(train.main, *argv, "--more")
    assert status == 0, err
    assert_same_weights(tmp_path / "run" / "eagle.pt", folder / "eagle.pt")


def test_a_head_that_comes_later_goes_through_all_rounds(rounds, call, monkeypatch, tmp_path):
    """Or it would have learnt from fewer tokens than those it is compared with."""
    folder, argv = rounds
    argv = [str(tmp_path / "run") if word == str(folder) else word for word in argv]
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr("selfwritten.ON_CPU", 20)
    assert call(train.main, *argv, "--more")[0] == 0
    argv[argv.index("eagle")] = "eagle-later"
    for said in ("eagle-later ", "eagle-later: trained already"):
        status, out, err = call(train.main, *argv)
        assert status == 0 and said in out, err
    amounts = []
    for name in ("eagle", "eagle-later"):
        record = load_checkpoint(tmp_path / "run" / f"{name}.pt", "draft head")["training"]
        amounts.append([entry["tokens"] for entry in record["rounds"]])
    assert amounts[0] == amounts[1] and len(amounts[0]) == 2


def test_text_that_was_removed_is_written_anew(rounds, call, monkeypatch, tmp_path):
    folder, argv = rounds
    argv = [str(tmp_path / "run") if word == str(folder) else word for word in argv]
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "conversations")
    monkeypatch.setattr("selfwritten.ON_CPU", 20)
    argv[argv.index("eagle")] = "eagle-later"
    status, out, err = call(train.main, *argv)
    assert status == 0 and " texts of " in out, err


def test_a_round_that_was_interrupted_goes_on_as_that_round(rounds, call, monkeypatch, tmp_path):
    folder, argv = rounds
    argv = [str(tmp_path / "run") if word == str(folder) else word for word in argv]
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr("selfwritten.ON_CPU", 20)

    def schedule_with_interrupt(step: int, steps: int) -> float:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(train, "schedule", schedule_with_interrupt)
        status, _, err = call(train.main, *argv, "--more")
    assert status == 130 and "eagle stands at step 4" in err
    status, out, err = call(train.main, *argv)  # also without --more
    assert status == 0 and "eagle: going on at step 4" in out, err
    assert " texts of " not in out  # nothing is written: heads have begun to learn
    record = load_checkpoint(tmp_path / "run" / "eagle.pt", "draft head")["training"]
    assert len(record["rounds"]) == 2
