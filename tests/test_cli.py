"""The command lines, from the user's side: what works, and how everything else is refused.

A mistake has to end in one line that says what to do, with exit status 2 and nothing half-written:
a reader who meets a traceback in the first minute does not know whether he or the code is wrong.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import speculate
import train
from plumbing.cli import UserError, parse
from plumbing.machine import choose_device
from plumbing.show import Printer
from recipe import HEADS, PRESETS, TrainConfig, head_settings, recorded, usual_preset

ROOT = Path(__file__).parent.parent
# `--dtype auto` is measured, so that two runs on a busy machine may differ in it.
SPEAK = ["--prompt", "cat", "--max_new_tokens", "12", "--device", "cpu", "--dtype", "float32"]


def script(name: str, *argv, cwd=ROOT, stdin: bytes = b"", **variables):
    """The real thing: another process."""
    command = [sys.executable, str(ROOT / name), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=environment)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(result: tuple[int, str, str], *mentioned: str) -> None:
    status, out, err = result
    assert status == 2, (status, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err + out
    assert all(word in err for word in mentioned), err


@pytest.fixture
def speak(tiny_run, call):
    """speculate.py on the tiny run; later flags win."""
    return lambda *argv: call(speculate.main, *SPEAK, "--out_dir", tiny_run.folder, *argv)


# ------------------------------------------------------------------------- speculate.py refuses

BAD_REQUESTS = {
    "empty prompt": (["--prompt", ""], "empty"),
    "prompt beyond the window": (["--prompt", "0 " * 200], "at most 31"),
    "nothing to write": (["--max_new_tokens", "0"], "max_new_tokens is 0"),
    "less than nothing to write": (["--max_new_tokens", "-3"], "max_new_tokens is -3"),
    "nothing to draft": (["--gamma", "0"], "gamma is 0"),
    "negative gamma": (["--gamma", "-1"], "gamma is -1"),
    "gamma beyond Medusa's heads": (["--head", "medusa", "--gamma", "5"], "at most 4"),
    "negative temperature": (["--temperature", "-1"], "temperature"),
    "infinite temperature": (["--temperature", "inf"], "temperature"),
    "no temperature": (["--temperature", "nan"], "temperature"),
    "negative top_k": (["--top_k", "-1"], "top_k is -1"),
    "top_p of 0": (["--top_p", "0"], "top_p"),
    "top_p above 1": (["--top_p", "1.5"], "top_p"),
    "no top_p": (["--top_p", "nan"], "top_p"),
    "seed beyond 64 bits": (["--seed", "1" + "0" * 30], "seed"),
    "unknown head": (["--head", "hydra"], "eagle-koala, medusa, medusa-koala"),
    "unknown flag": (["--gama", "3"], "--gama"),
    "abbreviated flag": (["--temp", "1"], "--temp"),
    "flag without a value": (["--gamma"], "--gamma"),
    "word for a number": (["--gamma", "four"], "four"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "unsupported device": (["--device", "meta"], "meta"),
    "unknown dtype": (["--dtype", "int8"], "int8"),
    "no such run": (["--out_dir", "nowhere"], "train.py"),
}


@pytest.mark.parametrize("argv, mentioned", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_request_that_cannot_be_met_is_refused_in_a_line(speak, argv, mentioned):
    assert_refused(speak(*argv), mentioned)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none_is_refused(speak, device):
    assert_refused(speak("--device", device), "--device cpu")


def test_without_any_run_the_way_to_one_is_named(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("targets.loading.TRAINED", tmp_path / "trained")
    assert_refused(call(speculate.main, *SPEAK), "train.py")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken_run(tiny_run, tmp_path) -> Path:
    """A copy of the run, to be broken."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))


@pytest.mark.parametrize("file", ["target.pt", "eagle-koala.pt"])
@pytest.mark.parametrize(
    "damage, mentioned",
    [
        (lambda path: path.unlink(), "there is no"),
        (lambda path: path.write_bytes(b"corrupt" * 100), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: torch.save({"kind": "a cake"}, path), "not the checkpoint of"),
    ],
    ids=["missing", "corrupt", "truncated", "empty", "of another kind"],
)
def test_a_broken_checkpoint_is_refused_by_name(call, broken_run, file, damage, mentioned):
    damage(broken_run / file)
    before = contents(broken_run)
    argv = [*SPEAK, "--out_dir", broken_run, "--head", "eagle-koala"]
    assert_refused(call(speculate.main, *argv), mentioned, file)
    assert contents(broken_run) == before


def test_a_head_of_another_target_is_refused(call, broken_run, speak):
    checkpoint = torch.load(broken_run / "eagle.pt", weights_only=True)
    torch.save(checkpoint | {"target": "0123456789abcdef"}, broken_run / "eagle.pt")
    result = call(speculate.main, *SPEAK, "--out_dir", broken_run, "--head", "eagle")
    assert_refused(result, "another target")
    assert_refused(speak("--head", broken_run / "eagle.pt"), "another target")


# --------------------------------------------------------------------------- speculate.py works


def test_speculation_from_the_shell_end_to_end(tiny_run):
    argv = ["--out_dir", tiny_run.folder, "--max_new_tokens", "12", "--prompt", "The old cat"]
    result = script("speculate.py", *argv)
    out = result.stdout.decode()
    assert result.returncode == 0, result.stderr
    assert "autoregressive" in out and "speedup" in out
    assert "\nthe two outputs are identical\n" in out
    refused = script("speculate.py", *argv, "--gamma", "0")
    assert_refused((refused.returncode, refused.stdout.decode(), refused.stderr.decode()), "gamma")


@pytest.mark.parametrize("head", HEADS)
def test_every_head_writes_what_the_target_alone_writes(speak, head):
    status, out, _ = speak("--head", head)
    assert status == 0 and "the two outputs are identical" in out


def test_what_is_written_is_shown_once_and_without_colour_in_a_pipe(speak):
    _, plain, _ = speak("--head", "none")
    _, out, _ = speak()
    text = [page.split("\n\n", 1)[1].split("\nautoregressive")[0] for page in (plain, out)]
    assert text[0] == text[1] != "" and "\033" not in out


def test_a_seed_decides_what_is_sampled(speak):
    pages = [speak("--temperature", "1", "--seed", seed)[1] for seed in ("1", "1", "2")]
    texts = [page.split("\n", 1)[1].split("\nautoregressive")[0] for page in pages]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("terminal, no_color, coloured", [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_accepted_drafts_are_coloured_in_a_terminal_unless_told_not_to(
    monkeypatch, capsys, terminal, no_color, coloured
):
    """By the convention of no-color.org: an empty NO_COLOR says nothing."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(terminal))
    monkeypatch.setenv("NO_COLOR", no_color)
    encoding = SimpleNamespace(decode_bytes=lambda tokens: bytes(tokens))
    printer = Printer(encoding, stops={0})
    printer.show(SimpleNamespace(tokens=[65, 66], accepted=1))
    printer.finish()
    assert capsys.readouterr().out == ("\033[32mA\033[0mB\n" if coloured else "AB\n")


def test_a_trace_shows_every_cycle_in_lines_of_at_most_100_columns(speak):
    status, out, _ = speak("--trace", "--temperature", "1", "--gamma", "4")
    assert status == 0 and max(map(len, out.splitlines()[1:])) <= 100
    assert "prefill" in out and "cycle 1" in out
    assert re.search(
        r"p [01]\.\d+  q [01]\.\d+  p/q \S+ +u 0\.\d+  (accept: u <|REJECT: u >=) p / q", out
    )
    assert out.count("\n  + ") == out.count("\ncycle ")


def test_a_traced_tree_is_indented_by_depth(speak):
    status, out, _ = speak("--trace", "--nodes", "9", "--gamma", "3")
    assert status == 0 and max(map(len, out.splitlines()[1:])) <= 100
    assert re.search(r"cycle 1: drafted 9, accepted \d, wrote \d; draft \d+\.\d ms, verify", out)
    assert re.search(r"^  '.*\n    '", out, re.M) and "the target chose" in out


@pytest.mark.parametrize("head", ["medusa", "eagle-koala"])
@pytest.mark.parametrize("size", [("--nodes", "auto"), ("--gamma", "auto")], ids=str)
def test_the_size_of_a_draft_can_be_left_to_measurement(speak, head, size, monkeypatch):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    status, out, _ = speak("--head", head, *size)
    assert status == 0 and "the two outputs are identical" in out
    assert re.search(r"drafting a (chain|tree) of \d+.*, by measurement", out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="passes are recorded there")
def test_without_a_gpu_compiling_costs_a_line_and_nothing_else(speak):
    status, out, _ = speak("--compile")
    assert status == 0 and "--compile records passes on a GPU" in out.splitlines()[0]
    assert "the two outputs are identical" in out


@pytest.mark.parametrize("raw", [b"The cat\n", b"\xff\xfe invalid \xc3", "日本 😀".encode()])
def test_a_prompt_can_come_from_standard_input(speak, monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    status, out, err = speak("--prompt", "-")
    assert status == 0 and "identical" in out, err


def test_empty_standard_input_is_an_empty_prompt(speak, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert_refused(speak("--prompt", "-"), "empty")


def test_a_prompt_argument_that_is_no_utf8_is_read_as_its_bytes(speak):
    assert speak("--prompt", os.fsdecode(b"caf\xe9 cat"))[0] == 0


def test_the_newest_run_under_out_is_the_default(tiny_run, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        shutil.copytree(tiny_run.folder, tmp_path / "out" / name)
    for newer, older in (("one", "other"), ("other", "one")):  # whatever the order of folders is
        for age, name in enumerate([newer, older]):
            for path in (tmp_path / "out" / name).glob("*.pt"):
                os.utime(path, (1e9 - age, 1e9 - age))
        status, out, _ = call(speculate.main, *SPEAK)
        assert status == 0 and out.startswith(f"run {Path('out') / newer}")


def test_three_lines_of_python_generate_text(tiny_run):
    from speculate import generate
    from targets.loading import load

    target, head, encoding = load(tiny_run.folder, "eagle", device="cpu")
    result = generate(target, encoding.encode_ordinary("The cat"), max_new_tokens=8, head=head)
    assert len(result.tokens) == 8 and encoding.decode(result.tokens)


# ----------------------------------------------------------------------------- train.py refuses

BAD_TRAINING = {
    "unknown preset": (["--preset", "huge"], ["huge", "smoke"]),
    "unknown flag": (["--learning_rate", "1"], ["--learning_rate"]),
    "a setting without a flag": (["--optimizer", "adamw"], ["--optimizer"]),
    "a flag that is gone": (["--minutes", "5"], ["--minutes"]),
    "unknown head": (["--head", "hydra"], ["hydra", "medusa"]),
    "head that only begins like one": (["--head", "eaglet"], ["eaglet"]),
    "layers for no head": (["--layers", "2"], ["--head"]),
    "lambda for no head": (["--adversarial_weight", "1"], ["--head"]),
    "a start for no head": (["--head", "none", "--init", "eagle.pt"], ["--head"]),
    "no layers": (["--head", "eagle", "--layers", "0"], ["--layers"]),
    "negative lambda": (["--head", "eagle", "--adversarial_weight", "-1"], ["adversarial_weight"]),
    "infinite lambda": (["--head", "eagle", "--adversarial_weight", "inf"], ["adversarial_weight"]),
    "no learning rate": (["--head_lr", "0"], ["--head_lr"]),
    "learning rate nan": (["--discriminator_lr", "nan"], ["--discriminator_lr"]),
    "no tokens": (["--target_tokens", "0"], ["--target_tokens"]),
    "fewer tokens than bytes": (["--target_vocab", "256"], ["257"]),
    "share above 1": (["--joint_from", "1.1"], ["--joint_from"]),
    "context too short": (["--target_context", "4"], ["--target_context"]),
    "context beyond the text": (["--target_context", "12000"], ["--target_context"]),
    "width of no even heads": (["--target_width", "33"], ["33"]),
    "seed beyond 64 bits": (["--seed", "1" + "0" * 30], ["seed"]),
    "unknown device": (["--device", "abacus"], ["abacus"]),
    "missing data": (["--data", "nowhere.txt"], ["nowhere.txt"]),
    "window beyond the target's": (["--head_window", "64"], ["--head_window 64"]),
    "window without room for a draft": (["--head_window", "7"], ["--head_window"]),
    "no draft position": (["--own_steps", "0"], ["--own_steps"]),
    "too many draft positions": (["--own_steps", "9"], ["--own_steps"]),
    "windows too short for them": (["--own_steps", "8", "--head_window", "8"], ["--own_steps 8"]),
    "negative draft vocabulary": (["--draft_vocab", "-1"], ["--draft_vocab"]),
    "draft vocabulary too small for its record": (["--draft_vocab", "3"], ["--draft_vocab", "16"]),
    "pretrained without a target": (
        ["--preset", "pretrained", "--head_window", "32"],
        ["--target"],
    ),
    "a target of another preset": (["--target", "x.gguf"], ["--preset pretrained", "--target"]),
    "a missing target": (
        ["--preset", "pretrained", "--head_window", "32", "--target", "nowhere.gguf"],
        ["nowhere.gguf", "smollm2"],
    ),
}


@pytest.mark.parametrize("argv, mentioned", BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_training_that_cannot_be_is_refused_in_a_line(tiny_run, call, tmp_path, argv, mentioned):
    argv = [*tiny_run.flags, "--out_dir", tmp_path / "run", *argv]
    assert_refused(call(train.main, *argv), *mentioned)
    assert not contents(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0binary", b"text, but little of it\n"])
def test_unusable_data_is_refused_by_name(tiny_run, call, tmp_path, content):
    (tmp_path / "given.txt").write_bytes(content)
    argv = [*tiny_run.flags, "--out_dir", tmp_path / "run", "--data", tmp_path / "given.txt"]
    assert_refused(call(train.main, *argv), "given.txt")
    assert contents(tmp_path) == {"given.txt": content}


def test_a_run_folder_that_is_a_file_is_refused_and_left_alone(tiny_run, call, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_refused(call(train.main, *tiny_run.flags, "--out_dir", tmp_path / "run"), "run")
    assert contents(tmp_path) == {"run": b"mine"}


@pytest.mark.parametrize("file", ["target.pt", "medusa.pt"])
def test_a_broken_run_is_not_trained_over(tiny_run, call, broken_run, file):
    (broken_run / file).write_bytes((broken_run / file).read_bytes()[:-5000])
    before = contents(broken_run)
    assert_refused(call(train.main, *tiny_run.flags, "--out_dir", broken_run), "damaged", file)
    assert contents(broken_run) == before


def test_progress_that_cannot_be_read_is_refused_by_name(tiny_run, call, tmp_path):
    (tmp_path / "target.progress.pt").write_bytes(b"half")
    argv = [*tiny_run.flags, "--out_dir", tmp_path]
    assert_refused(call(train.main, *argv), "target.progress.pt", "remove it")


def test_bad_training_flags_are_refused_from_the_shell(tmp_path):
    result = script("train.py", "--preset", "smoke", "--target_width", "-8", cwd=tmp_path)
    out, err = result.stdout.decode(), result.stderr.decode()
    assert_refused((result.returncode, out, err), "--target_width")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ the parser


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "pretrained"])
def test_a_preset_changes_defaults_and_flags_change_presets(preset):
    config = parse(TrainConfig, ["--preset", preset], PRESETS)
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value
    changed = parse(TrainConfig, ["--target_context", "64", "--preset", preset], PRESETS)
    assert changed.target_context == 64
    assert config.preset == preset and config.folder == Path("out") / preset


def test_a_pretrained_target_comes_with_its_own_preset():
    config = parse(TrainConfig, ["--target", "a/B.gguf"], PRESETS, usual=usual_preset)
    assert config.preset == "pretrained" and config.folder == Path("out/b")
    assert all(getattr(config, name) == value for name, value in PRESETS["pretrained"].items())


def test_dashes_do_for_underscores_and_a_plain_argument_is_the_prompt():
    config = parse(
        TrainConfig, ["--preset", "smoke", "--head-data=self", "--out-dir", "a-b"], PRESETS
    )
    assert config.head_data == "self" and config.out_dir == "a-b"
    for argv in (
        ["def foo():"],
        ["--prompt", "def foo():"],
        ["--max-new-tokens", "7", "def foo():"],
    ):
        assert parse(speculate.SpeculateConfig, argv).prompt == "def foo():"
    assert parse(speculate.SpeculateConfig, []).prompt == "def get_data(self, data):"


def test_help_shows_the_values_in_force_once_and_all_choices(capsys):
    for preset in PRESETS:
        target = ["--target", "x"] if preset == "pretrained" else []
        with pytest.raises(SystemExit) as stop:
            parse(
                TrainConfig, ["--preset", preset, *target, "--help"], PRESETS, about=train.__doc__
            )
        shown = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and shown.count("Training: first the target") == 1
        config = parse(TrainConfig, ["--preset", preset, *target], PRESETS)
        for name in ("target_width", "target_context", "head_tokens", *PRESETS[preset]):
            about = TrainConfig.__dataclass_fields__[name].metadata["about"]
            assert f"(default: {getattr(config, name)})" in shown or not about["flag"], name
        assert "None" not in shown and "{" + ",".join(PRESETS) + "}" in shown
        for flag in re.findall(r"--\w+ [^-]*", shown):
            assert flag.count("default") <= 1, flag


def test_devices_and_dtypes_by_name():
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="abacus"):
        choose_device("abacus")


def test_what_a_file_records_is_listed_here_in_full():
    """A setting that is left out by mistake could differ between two commands, and nothing told."""
    target = {"target_vocab", "target_context", "target_layers", "target_width", "target_tokens"}
    target |= {"target_heads", "target_mlp_width", "target_lr", "data", "seed", "batch_tokens"}
    assert recorded(TrainConfig(), "target").keys() == target
    head = {"head_data", "head_data_tokens", "written_tokens", "head_window", "init", "head_tokens"}
    head |= {"head_lr", "draft_vocab", "own_steps", "own_from", "feature_weight", "head_mlp_width"}
    head |= {"discriminator", "joint_from", "discriminator_steps", "discriminator_lr"}
    head |= {"data", "seed", "batch_tokens", "labels"}
    assert recorded(TrainConfig(), "head").keys() == head
    # Of what a head learns from by its kind, nothing is recorded: older files know of no other.
    assert "labels" not in head_settings(TrainConfig(), "eagle", "")
    assert head_settings(TrainConfig(labels="hard"), "eagle", "")["labels"] == "hard"
    free = {"preset", "out_dir", "device", "dtype", "target", "optimizer"}
    free |= {"head", "layers", "adversarial_weight"}  # of the last two a head records what it has
    assert {field.name for field in fields(TrainConfig)} == target | head | free


def test_dashes_are_changed_in_flags_only():
    for prompt in ("--dry-run is an option", "a --top-p b", "--x-y"):
        config = parse(speculate.SpeculateConfig, [f"--prompt={prompt}", "--top-p=0.5"])
        assert config.prompt == prompt and config.top_p == 0.5
