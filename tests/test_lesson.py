"""What is taught is what is there: exercises, their checks, and the laws that are shown."""

import ast
import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from study import exercise, pictures, verify
from study.exercise import EXERCISES, emptied, function
from study.verify import law_of, plainly, random_law

ROOT = Path(__file__).parent.parent
PROJECTS = ROOT / "tests/exercises"


@pytest.mark.parametrize("number", EXERCISES)
def test_a_blank_keeps_signature_and_docstring_and_nothing_of_the_body(number):
    for file, names in EXERCISES[number].blanks.items():
        source = (ROOT / file).read_text("utf-8")
        before, after = ast.parse(source), ast.parse(emptied(source, names, number))
        for name in names:
            ours, theirs = function(after, name), function(before, name)
            assert ast.dump(ours.args) == ast.dump(theirs.args)
            assert ast.get_docstring(ours) == ast.get_docstring(theirs)
            assert ast.unparse(ours.body[-1]) == f"raise NotImplementedError('exercise {number}')"
            assert not re.search(r"#.*\n.*raise NotImpl", emptied(source, [name], number))
            assert len(ours.body) <= 2 and ast.unparse(theirs) != ast.unparse(ours)
        lost = len(source.splitlines()) - len(emptied(source, names, number).splitlines())
        assert lost >= 0


@pytest.mark.parametrize("number", EXERCISES)
def test_a_function_that_is_to_be_written_says_what_it_is_to_do(number):
    for file, names in EXERCISES[number].blanks.items():
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert all(ast.get_docstring(function(tree, name)) for name in names)


def test_the_page_of_exercises_is_that_of_the_table():
    text = (ROOT / "EXERCISES.md").read_text("utf-8")
    told = dict(re.findall(r"^\*\*(\d+)\. (.*?)\*\*", text, re.M))
    assert told.keys() == {str(number) for number in EXERCISES}
    for number, one in EXERCISES.items():
        assert told[str(number)].lower() == one.title.lower()
        part = text.split(f"**{number}. ")[1].split("\n**")[0]
        assert f"{one.minutes} min" in part
        for file, names in one.blanks.items():
            assert f"]({file})" in part and all(f"`{name}`" in part for name in names)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        assert (ROOT / file).exists(), link
        assert not anchor or f"## {anchor.replace('-', ' ')}\n" in text.lower(), link


@pytest.mark.parametrize("number", EXERCISES)
def test_the_checks_of_an_exercise_are_there(number):
    files, _, chosen = EXERCISES[number].tests.partition(" -k ")
    names = []
    for file in files.split():
        names += re.findall(r"^def (test_\w+)", (ROOT / file).read_text("utf-8"), re.M)
    for word in chosen.strip("'").split(" or ") if chosen else [""]:
        assert any(word in name for name in names), word


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the project, whose exercises are done; without git."""
    left = shutil.ignore_patterns(".*", "out", "results", "docs", "__pycache__")  # .git, .venv
    folder = shutil.copytree(ROOT, tmp_path / "copy", ignore=left)
    monkeypatch.setattr(exercise, "ROOT", folder)
    monkeypatch.chdir(folder)
    return folder


def test_an_exercise_from_its_start_to_its_stop(copy, call):
    before = (copy / "sampling.py").read_text("utf-8")
    assert call(exercise.main, "check", 1)[0] == 2  # it has not begun
    status, out, err = call(exercise.main, "start", 1)
    assert (status, err) == (0, "") and "acceptance_probability, residual" in out
    status, out, err = call(exercise.main, "start", 3)
    assert status == 2 and "exercise 1 is at work in sampling.py: stop 1 first" in err
    assert "(at work)" in call(exercise.main, "list")[1]
    status, out, err = call(exercise.main, "check", 1)
    assert status == 1 and "tests fail:" in out and "Why it matters" in out
    assert "a cycle writes exactly the targets law (" in out and "NotImplementedError" in out
    assert re.search(r"passed through sampling.py, line \d+", out)
    assert "return (p_x / q_x)" in call(exercise.main, "solution", 1)[1]

    empty = (copy / "sampling.py").read_text("utf-8")
    (copy / "sampling.py").write_text(
        empty.replace("GREEDY_TEMPERATURE = 0.3", "GREEDY_TEMPERATURE = 1")
    )
    status, out, err = call(exercise.main, "check", 1)
    assert status == 2 and "sampling.py was changed outside of" in err
    (copy / "sampling.py").write_text(empty.replace("raise Not", "raise raise Not", 1))
    assert "sampling.py, line" in call(exercise.main, "check", 1)[2]
    (copy / "sampling.py").write_text(empty.replace("def residual(", "def what_is_left("))
    status, out, err = call(exercise.main, "check", 1)
    assert status == 2 and "sampling.py lacks one of" in err
    mine = before.replace(
        "return (p_x / q_x).clamp(max=1.0)", "return torch.minimum(p_x / q_x, torch.ones_like(p_x))"
    )
    assert mine != before
    (copy / "sampling.py").write_text(mine)
    status, out, err = call(exercise.main, "check", 1)
    assert status == 0 and "right: all" in out, out

    status, out, err = call(exercise.main, "stop", 1)
    assert status == 0 and (copy / "sampling.py").read_text("utf-8") == before
    assert (copy / "out/exercises/1/mine/sampling.py").read_text("utf-8") == mine
    assert call(exercise.main, "stop", 1)[0] == 2


# ---------------------------------------------------------------------------------- projects


WRONG = {
    "siblings: q stays": ("siblings", "q.index_fill(0, torch.tensor(token), 0.0)", "q"),
    "siblings: p stays": ("siblings", "residual(p, q), q.index", "p, q.index"),
    "siblings: all of p follows": ("siblings", "return accepted, left * p", "return accepted, p"),
    "lk_loss: the weight learns": ("lk_loss", "alpha.detach()", "alpha"),
    "lk_loss: acceptance alone": ("lk_loss", "w * divergence + ", ""),
    "lk_loss: a sum": ("lk_loss", ".mean()", ".sum()"),
    "run_judge: each state alone": (
        "run_judge",
        "self.run(states, self.begin(h_from)[None].contiguous())[0]",
        "self.begin(states).tanh()",
    ),
    "run_judge: from behind": ("run_judge", "self.run(states, ", "self.run(states.flip(1), "),
}


def failed_checks(source: str, name: str) -> list[str]:
    """The checks of a project that what stands in `source` does not pass."""
    space = {}
    exec(source, space)
    failed = []
    for check in importlib.import_module(f"check_{name}").CHECKS:
        try:
            check(space[name])
        except (AssertionError, ValueError):
            failed.append(check.__name__)
    return failed


@pytest.mark.parametrize("name", ["siblings", "lk_loss", "run_judge"])
def test_a_project_that_is_done_passes_its_checks(name, monkeypatch):
    monkeypatch.syspath_prepend(PROJECTS)
    assert failed_checks((PROJECTS / "answers.py").read_text("utf-8"), name) == []


@pytest.mark.parametrize("name, right, wrong", WRONG.values(), ids=WRONG)
def test_a_project_that_is_done_wrongly_does_not(name, right, wrong, monkeypatch):
    monkeypatch.syspath_prepend(PROJECTS)
    source = (PROJECTS / "answers.py").read_text("utf-8")
    assert source.count(right) == 1
    assert failed_checks(source.replace(right, wrong), name)


# ------------------------------------------------------------------------- laws and pictures


def test_the_law_of_plain_decoding_is_the_product_of_its_conditionals():
    p = random_law(5)
    law = law_of(lambda text: plainly(p, text))
    assert law.sum().item() == pytest.approx(1.0, abs=1e-14)
    for text in ((0, 1, 2), (2, 2, 0)):
        product = p[0][text[0]] * p[1][text[:1]][text[1]] * p[2][text[:2]][text[2]]
        assert law[text].item() == pytest.approx(product.item(), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_laws_that_are_shown_are_one_and_broken_rules_are_seen(call, seed):
    status, out, err = call(verify.main, "--seed", seed)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if re.match(r"  [abc]{3} ", line)]
    assert len(rows) == 27 and all(len(set(row[1:])) == 1 for row in rows)
    assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=1e-3)
    assert re.search(r"The largest difference is \de-1[5-9]", out)
    assert len(re.findall(r"% of its texts are wrong", out)) == 3


@pytest.mark.parametrize("broken", ["residual", "acceptance_probability", "match"])
def test_a_broken_rule_of_the_decoder_is_seen_there(call, monkeypatch, broken):
    if broken == "match":
        first = torch.zeros((), dtype=torch.long)
        monkeypatch.setattr(verify, "match", lambda tokens, shape, choice: (first, choice[-1]))
        assert call(verify.main)[0] == 1
        return
    chained = verify.chained
    wrong = {"residual": lambda p, q: p, "acceptance_probability": lambda p, q: p}[broken]
    names = {"residual": "rest", "acceptance_probability": "accept"}

    def spoilt(p, q, text, **more):
        return chained(p, q, text, **{names[broken]: wrong} | more)

    monkeypatch.setattr(verify, "chained", spoilt)
    assert call(verify.main)[0] == 1


def test_the_pictures_are_drawn_from_the_code_as_it_is(call, tmp_path):
    status, out, err = call(pictures.main, "--out", tmp_path)
    assert (status, err) == (0, "")
    names = {"cycle.png", "rule.png", "tree.png", "heads.png", "joint.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
