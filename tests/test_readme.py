"""The documents are read first and trusted most: they have to say what code and results say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from plumbing.cli import UserError
from study import report
from study.ablation import compared
from study.depth import tabled
from study.foresight import figures_of
from study.report import DOCUMENTS, RESULTS, with_tables
from study.statistics import evaluate, reckoned
from targets.outputs import is_loop

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = [*DOCUMENTS, ROOT / "targets/README.md", ROOT / "study/README.md"]
SCRIPTS = {
    "train.py": ["recipe.py"],
    "speculate.py": ["speculate.py"],
    "bench.py": ["speculate.py", "bench.py"],
    "study.ablation": ["study/ablation.py"],
    "study.report": [],
    "study.prompts": ["study/prompts.py"],
    "study.sizes": ["study/sizes.py"],
    "study.foresight": ["study/foresight.py"],
    "study.depth": ["study/depth.py"],
    "study.overhead": ["study/overhead.py"],
    "study.gpu": ["study/gpu.py"],
    "study.exercise": [],
    "study.verify": ["study/verify.py"],
    "study.pictures": ["study/pictures.py"],
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(document):
    text = document.read_text("utf-8")
    assert text.count("<!-- end -->") >= 1
    assert with_tables(text) == text, "run python -m study.report"


def test_every_result_has_its_table():
    text = (ROOT / "RESULTS.md").read_text("utf-8")
    for path in RESULTS.glob("*.json"):
        # A point of a plot, and of a text; and rows of the table of `auto`.
        known = {"ablation-long": "", "ablation-seed1": "", "sizes": "<!-- auto -->"}
        of_many = known.get(path.stem, known.get(path.stem.split("-")[0]))
        assert (f"<!-- results/{path.name} -->" if of_many is None else of_many) in text, path.name


def test_every_glossary_name_exists_in_its_file():
    glossary = README.read_text("utf-8").split("## Glossary")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in glossary.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for _, _, names, file, _ in rows:
        source = (ROOT / file.strip()).read_text("utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", source), f"{name} is not in {file}"


def anchors_of(path: Path) -> list[str]:
    headings = re.findall(r"^#+ (.*)", path.read_text("utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


@pytest.mark.parametrize("guide", [*GUIDES, ROOT / "study/LOG.md"], ids=str)
def test_every_link_leads_somewhere(guide):
    for link in re.findall(r"\]\(([^)]+)\)", guide.read_text("utf-8")):
        if link.startswith("https://arxiv.org/"):
            continue
        file, _, anchor = link.partition("#")
        path = guide.parent / file if file else guide
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path), link


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_every_flag_of_a_command_exists(guide):
    """But for commands that are printed with the commit that still knew them."""
    for line in guide.read_text("utf-8").splitlines():
        for command in re.findall(r"python (?:-m )?(?:\w+\.py|study\.\w+)[^`|]*", line):
            script = command.split()[-1 if len(command.split()) < 2 else 1]
            script = command.split()[2] if script == "-m" else script
            if "at commit" in line:
                continue
            sources = "".join((ROOT / file).read_text("utf-8") for file in SCRIPTS[script])
            for flag in re.findall(r"--(\w+)", command):
                known = flag == "help" or re.search(rf"^    {flag}: ", sources, re.M)
                assert known, f"{command}: --{flag}"


def test_the_notebook_is_newest_first_and_has_an_index():
    text = (ROOT / "study/LOG.md").read_text("utf-8")
    dates = re.findall(r"^## .*?(\d{4}-\d\d-\d\d)", text, re.M)
    assert len(dates) > 40 and dates == sorted(dates, reverse=True)
    linked = re.findall(r"\]\(#([^)]+)\)", text)
    assert set(anchors_of(ROOT / "study/LOG.md")[1:]) <= set(linked) | {"index"}


def test_results_hold_every_sample_behind_their_figures():
    """The figures of each committed result are those that its own samples give."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "cells" in result:  # an ablation
            heads = {cell: row["heads"] for cell, row in result["cells"].items()}
            assert_same(compared(heads), result["cells"])
            continue
        if "table" in result:  # study/depth.py
            for part in [result, *result["real"].values()]:
                assert_same(tabled(part), {key: part[key] for key in ("tau_ratios", "table")})
            continue
        if "foreseen" in result and "test" not in result:
            continue
        if "foreseen" in result:
            greedy = result["config"]["temperature"] == 0
            assert_same(figures_of(result["test"], greedy), result["test"]["figures"])
            continue
        if "overhead" in result:
            continue
        seed, costs = result["config"]["seed"], result["isolated_seconds"]
        measured = result["samples"], result["seconds"], costs
        greedy = result["config"]["temperature"] == 0
        again = evaluate(result["methods"], seed, *measured, greedy=greedy)
        assert_same(again, result["figures"])


def assert_same(ours, theirs, key: str = ""):
    """Equal up to rounding; the intervals more roughly, since numpy may draw otherwise one day."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_same(ours[name], theirs[name], name)
    elif isinstance(theirs, list) and theirs and isinstance(theirs[0], (dict, list)):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, key)
    elif theirs is None or isinstance(theirs, str):
        assert ours == theirs, key
    else:
        tolerance = 0.03 if "interval" in key else 1e-9
        assert ours == pytest.approx(theirs, rel=tolerance), key


def sample(produced: list[int], uncut: int, loop: bool = False, conversation: int = 0) -> dict:
    tokens = list(range(sum(produced) + 1))
    entry = {"tokens": tokens, "produced": produced, "uncut_cycles": uncut, "phases": [2, 1, 1]}
    entry["drafts"] = [["drafted", 4]] * len(produced)
    plain = {"tokens": tokens, "produced": [1] * (len(tokens) - 1), "uncut_cycles": len(tokens) - 1}
    methods = {"autoregressive": plain, "eagle": entry}
    about = {"task": "code", "conversation": conversation, "prompt": [1] * 3}
    return about | {"loop": loop, "methods": methods}


def costs_of(methods: dict) -> dict:
    return {"step": 1.0, "backlog": 3, "passes": [[1, 1.0], [3, 1.2], [9, 1.8]]} | methods


def test_the_predicted_time_is_that_of_each_cycles_kind():
    """Nothing drafted, copies, a head's whole draft and a cut one, and what the head has missed."""
    row = {"produced": [1, 4, 2, 3, 2], "uncut_cycles": 4}
    row["drafts"] = [["copied", 0], ["copied", 8], ["drafted", 4], ["drafted", 4], ["drafted", 2]]
    costs = costs_of({"eagle": {"verify": 1.5, "draft": 0.4, "absorb": 0.01}})
    draft, verify = reckoned(row, 10, 4, costs["eagle"], costs)
    assert verify == pytest.approx(1.0 + 1.8 + 1.5 + 1.5 + 1.2)
    # It reads the prompt and five tokens before its first draft, then 2 and 3: no more than usual.
    assert draft == pytest.approx(0.4 + 0.01 * (10 + 1 + 4 - 3) + 0.4 + 0.2)


def test_the_interval_of_a_speed_is_over_prompts_and_its_range_over_runs():
    samples = [sample([2] * 10, 10, conversation=i) for i in range(12)]
    plain, ours = [10.0] * 12, [4.0 + i % 3 for i in range(12)]
    seconds = {"autoregressive": [plain, plain], "eagle": [ours, [2 * s for s in ours]]}
    costs = costs_of({"eagle": {"verify": 1.0, "draft": 1.0, "absorb": 0.0}})
    methods = {"eagle": {"head": "eagle", "gamma": 4, "nodes": 0, "setting": "chain"}}
    head = evaluate(methods, 0, samples, seconds, costs)["heads"]["eagle"]
    assert head["speedup_range"] == [pytest.approx(1.0), pytest.approx(2.0)]
    assert head["speedup"] == pytest.approx(1.5)
    low, high = head["speedup_interval"]
    assert 1.5 * 5 / 5.6 < low < 1.5 < high < 1.5 * 5 / 4.4


def test_tau_is_tokens_over_uncut_cycles_summed_over_loop_free_prompts():
    samples = [sample([5, 1, 3], 2), sample([2, 2, 2, 2], 4), sample([5, 5, 5], 3, loop=True)]
    seconds = {"autoregressive": [[9.0, 8.0, 15.0]], "eagle": [[3.0, 4.0, 3.0]]}
    costs = costs_of({"eagle": {"verify": 1.5, "draft": 0.5, "absorb": 0.0}})
    methods = {"eagle": {"head": "eagle", "gamma": 4, "nodes": 0, "setting": "chain"}}
    figures = evaluate(methods, 0, samples, seconds, costs)
    head = figures["heads"]["eagle"]
    assert head["tau"] == pytest.approx((5 + 1 + 2 + 2 + 2 + 2) / 6)
    assert head["tau_on_loops"] == pytest.approx(15 / 3)
    assert head["accepted_histogram"] == [1, 4, 0, 0, 1]
    assert head["conditional_acceptance"] == pytest.approx([5 / 6, 1 / 5, 1, 1])
    assert head["speedup"] == pytest.approx((17 / 7) / (17 / 17))
    assert head["predicted_speedup"] == pytest.approx(17 / 7 / 2)
    assert head["elsewhere"] == pytest.approx(1 / 4)
    low, high = head["tau_interval"]
    assert low <= head["tau"] <= high
    assert figures["loop_free"] == 2


def test_without_a_whole_cycle_there_is_no_tau():
    """It was a tau of 0, where 1 is the least."""
    samples = [sample([3], 0), sample([2], 0), sample([5, 5, 2], 2, loop=True)]
    seconds = {"autoregressive": [[1.0] * 3], "eagle": [[1.0] * 3]}
    costs = costs_of({"eagle": {"verify": 1.0, "draft": 0.5, "absorb": 0.0}})
    methods = {"eagle": {"head": "eagle", "gamma": 4, "nodes": 0, "setting": "chain"}}
    with pytest.raises(UserError, match="eagle: each text that counts ends within its first cycle"):
        evaluate(methods, 0, samples, seconds, costs)
    samples[1] = sample([2, 2, 2], 3, conversation=1)  # now some draws have a cycle, and some none
    low, high = evaluate(methods, 0, samples, seconds, costs)["heads"]["eagle"]["tau_interval"]
    assert low == high == 2


@pytest.mark.parametrize("together", [True, False])
def test_the_turns_of_a_conversation_are_drawn_together(together):
    """Drawn apart, sixteen turns of four conversations would pass for sixteen that know nothing of
    each other, and the interval would be half as wide."""
    samples = [sample([1 + i // 4] * 4, 4, False, i // 4 if together else i) for i in range(16)]
    seconds = {"autoregressive": [[1.0] * 16], "eagle": [[1.0] * 16]}
    costs = costs_of({"eagle": {"verify": 1.0, "draft": 0.0, "absorb": 0.0}})
    methods = {"eagle": {"head": "eagle", "gamma": 4, "nodes": 0, "setting": "chain"}}
    low, high = evaluate(methods, 0, samples, seconds, costs)["heads"]["eagle"]["tau_interval"]
    assert (1.7 if together else 0.9) < high - low < (2.6 if together else 1.3)


def test_koala_is_compared_with_its_original_and_trees_with_their_chain():
    entry = sample([3, 3], 2)["methods"]["eagle"]
    settings = [
        ("eagle", "chain"),
        ("eagle-koala", "chain"),
        ("eagle-k2", "chain"),
        ("eagle", "auto"),
        ("eagle-koala", "auto"),
    ]
    methods = {f"{h} {s}": {"head": h, "setting": s, "gamma": 4, "nodes": 0} for h, s in settings}
    row = sample([3, 3], 2)
    row["methods"] |= {name: entry for name in methods}
    seconds = {"autoregressive": [[6.0]]} | {name: [[3.0]] for name in methods}
    seconds["eagle-koala chain"] = [[2.0]]
    costs = costs_of({name: {"verify": 1.0, "draft": 1.0, "absorb": 0.0} for name in methods})
    found = evaluate(methods, 0, [row], seconds, costs)["comparisons"]
    pairs = {name: [other["with"] for other in rows] for name, rows in found.items()}
    assert pairs == {
        "eagle-koala chain": ["eagle chain"],
        "eagle-k2 chain": ["eagle chain"],
        "eagle auto": ["eagle chain"],
        "eagle-koala auto": ["eagle auto", "eagle-koala chain"],
    }
    assert found["eagle-koala chain"][0]["net_speed"] == pytest.approx(1.5)
    asked = {"eagle auto": ["eagle-koala chain", "eagle chain"]}
    found = evaluate(methods, 0, [row], seconds, costs, asked)["comparisons"]
    assert list(found) == ["eagle auto"]
    assert [f["net_speed"] for f in found["eagle auto"]] == [pytest.approx(2 / 3), 1.0]


def test_the_size_that_auto_chose_is_compared_with_the_best_on_validation_prompts(monkeypatch):
    settings = {"eagle": "chain", "eagle chain 2": "chain 2", "eagle auto": "auto"}
    methods = {
        name: {"head": "eagle", "setting": setting, "gamma": 4, "nodes": 0, "lookup": 0}
        | {"chosen": "measured" if setting == "auto" else None}
        for name, setting in settings.items()
    }
    methods["eagle chain 2"]["gamma"] = 2
    row = sample([3, 3], 2)
    row["methods"] |= dict.fromkeys(methods, row["methods"]["eagle"])
    speeds = {"eagle": 3.0, "eagle chain 2": 1.0, "eagle auto": 2.0}  # on test prompts
    test = {
        "methods": methods,
        "samples": [row],
        "seconds": {"autoregressive": [[6.0]]} | {n: [[6 / s]] for n, s in speeds.items()},
        "isolated_seconds": costs_of(
            {name: {"verify": 1.0, "draft": 1.0, "absorb": 0.0} for name in methods}
        ),
        "config": {"seed": 0},
    }
    # The chain of 2 was the fastest on validation prompts: what is fastest here does not count.
    found = {"eagle": 1.1, "eagle chain 2": 1.3, "eagle auto": 1.4}
    valid = {"figures": {"heads": {name: {"speedup": s} for name, s in found.items()}}}
    results = {"sizes-a-valid": valid, "sizes-a-test": test}
    monkeypatch.setattr(report, "read_result", results.get)
    monkeypatch.setattr(report, "SIZED", ("a",))
    monkeypatch.setattr(report, "SUMMARY", {"a": "small GPT"})
    *_, line = report.auto_table().splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["small GPT", "eagle", "chain of 2", "chain of 4"]
    assert cells[4].startswith("2.000 [") and cells[5].startswith("0.667 [")


def test_a_text_that_repeats_itself_is_a_loop():
    assert is_loop([1, 2, 3] * 20)
    assert not is_loop(list(np.random.default_rng(0).integers(0, 50, 128)))
