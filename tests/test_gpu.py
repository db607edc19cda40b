"""The steps that a GPU runs: each is a command that its script takes, kept as soon as it ends."""

import json
import time

import pytest
import torch

from bench import BenchConfig
from plumbing.cli import parse
from recipe import PRESETS, TrainConfig
from speculate import SpeculateConfig
from study import gpu
from study.gpu import GpuConfig, run_step, steps_of

TAKES = {"bench.py": BenchConfig, "speculate.py": SpeculateConfig}


@pytest.mark.parametrize("part", ["small", "pretrained"])
def test_each_step_is_a_command_that_its_script_takes(part):
    config = GpuConfig(part, target="some.gguf", num_prompts=3, out_dir="out/some")
    steps, seen = steps_of(config), []
    for script, *argv in steps.values():
        if script == "train.py":
            taken = parse(TrainConfig, argv, presets=PRESETS, usual=lambda argv: "pretrained")
            assert (taken.target, taken.device) == ("some.gguf", "cuda")
            assert taken.head_tokens == config.head_tokens
            seen.append((taken.head, *taken.layers_and_weight(taken.head)))
        elif script != "-m":
            taken = parse(TAKES[script], argv)
            seen.append(taken.compile)
            assert taken.device == "cuda"
            assert script == "speculate.py" or (taken.num_prompts, taken.runs) == (3, 2)
    if part == "small":
        assert [*steps][:3] == ["tests", "eager", "recorded"]
        assert seen == [False, True] * 4  # cheap ones first, and each eager before it is recorded
    else:
        assert seen == [("eagle", 1, 0.0), ("eagle-k2", 2, 0.0), True, False, True, False]
    on_cpu = steps_of(GpuConfig(part, device="cpu"))
    assert [*on_cpu] == [*steps] and not any("--compile" in step for step in on_cpu.values())


def test_a_step_says_how_it_ended():
    assert run_step(["-c", "print(1 + 1)"], 60)["ended"] == "done"
    failed = run_step(["-c", "print('before'); raise SystemExit(3)"], 60)
    assert failed["ended"] == "exit status 3" and failed["printed"] == "before\n"
    # Interrupted as by Ctrl-C, which our scripts hear from a background job, too: it keeps its work.
    endless = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    endless += "print('begun', flush=True)\ntry:\n    time.sleep(60)\n"
    begin = time.monotonic()
    cut = run_step(["-c", endless + "except KeyboardInterrupt:\n    print('kept')"], 2)
    assert cut["ended"] == "interrupted" and cut["printed"] == "begun\nkept\n"
    assert time.monotonic() - begin < 30


def test_one_that_hears_no_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun', "
    cut = run_step(["-c", deaf + "flush=True)\ntime.sleep(60)"], 2)
    assert cut["ended"] == "interrupted" and cut["printed"] == "begun\n" and cut["seconds"] < 30


def test_what_succeeded_is_not_run_again(tmp_path, call, monkeypatch):
    """A failed step stops no other; the second call runs it alone, and those of other settings."""
    ran = tmp_path / "ran"

    def steps(config):
        note = f"open({str(ran)!r}, 'a').write"
        return {
            "first": ["-c", f"{note}('1')"],
            "fails": ["-c", f"{note}('2'); raise SystemExit({not (tmp_path / 'mended').exists()})"],
            "last": ["-c", f"{note}('3' * {config.num_prompts})"],
        }

    monkeypatch.setattr(gpu, "steps_of", steps)
    argv = ["--out_dir", tmp_path, "--device", "cpu", "--num_prompts"]
    status, out, _ = call(gpu.main, *argv, 1)
    assert status == 0 and ran.read_text() == "123"
    kept = json.loads((tmp_path / "gpu-small.json").read_text())["steps"]
    assert [step["ended"] for step in kept.values()] == ["done", "exit status 1", "done"]
    assert "2 of 3 steps done" in out
    assert call(gpu.main, *argv, 1)[0] == 0 and ran.read_text() == "1232"
    assert call(gpu.main, *argv, 2)[0] == 0 and ran.read_text() == "1232" + "233"
    status, out, _ = call(gpu.main, *argv, 2, "--minutes", "1e-9")
    assert status == 0 and ran.read_text() == "1232233" and "fails: no time left" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, call):
    status, _, err = call(gpu.main, "--out_dir", tmp_path / "new")
    assert status == 2 and err.count("\n") == 1 and "no CUDA GPU" in err
    assert not (tmp_path / "new").exists()
