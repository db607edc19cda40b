"""Exercises that check themselves: a function is emptied, you write it again, its tests judge it.

    python -m study.exercise list           all of them, with the minutes they take
    python -m study.exercise start 1        empties the functions of exercise 1; docstrings stay
    python -m study.exercise check 1        runs the tests that know them, and says what failed
    python -m study.exercise solution 1     shows how they are written here
    python -m study.exercise stop 1         puts them back; your text is kept in out/exercises/1/

EXERCISES.md has the questions. There is one source: the blanks are made from the code as it is, and
the checks are the project's own tests. So neither can grow old without a test that says so.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from plumbing.cli import UserError, option, parse, run

ROOT = Path(__file__).parent.parent
KEPT = Path("out/exercises")


class Exercise(NamedTuple):
    title: str
    blanks: dict[str, list[str]]  # file -> functions that are emptied; a method as Class.name
    tests: str  # what pytest is given
    minutes: int
    why: str  # what goes wrong in the world where this is wrong
    fails: bool = False  # whether its tests are to fail: one is asked to break the code


EXERCISES = {
    1: Exercise(
        "the rule",
        {"sampling.py": ["acceptance_probability", "residual"]},
        "tests/test_rule.py -k 'writes_exactly or wrong_rule or residual'",
        20,
        "the text would have another law than the target's, and still read well",
    ),
    2: Exercise(
        "a drawn draft is judged",
        {"speculate.py": ["verify"]},
        "tests/test_rule.py -k verify",
        35,
        "tokens behind a rejected one would be kept, the last one drawn from the wrong law, or a "
        "uniform used twice, which ties a token to the verdict before it",
    ),
    3: Exercise(
        "cheat, and be caught",
        {"sampling.py": ["acceptance_probability"]},
        "tests/test_rule.py",
        20,
        "a rule that accepts too much looks faster; no reader of its texts would notice",
        fails=True,
    ),
    4: Exercise(
        "named tokens are judged",
        {"speculate.py": ["match"], "drafts.py": ["deepest"]},
        "tests/test_drafts.py tests/test_properties.py"
        " -k 'deepest or any_shape or named or growing_tree_is or match_follows'",
        40,
        "a tree would bring nothing, or its text would be another: likeliest nodes are no samples",
    ),
    5: Exercise(
        "the mask of a tree, and a cache that forgets",
        {"drafts.py": ["ancestors"], "model.py": ["KVCache.rollback", "KVCache.keep"]},
        "tests/test_drafts.py tests/test_model.py -k 'own_path or keeping or rolled or pieces'",
        35,
        "a node would see its siblings, or the text the keys of a rejected draft",
    ),
    6: Exercise(
        "a draft without a model",
        {"drafts.py": ["Known.stood_before", "Lookup.draft"]},
        "tests/test_lookup.py -k 'followed or search or entered or copies_alone'",
        40,
        "copies would be missed, or the search would cost more the longer the text",
    ),
    7: Exercise(
        "the loop",
        {"speculate.py": ["generate"]},
        "tests/test_lossless.py -k 'reference or mismatch or perfect or limit or reads_the'",
        80,
        "the rules are right, and yet the text is another: bookkeeping",
    ),
    8: Exercise(
        "two heads",
        {"draft_head.py": ["Medusa.heads", "Eagle.step", "Eagle.prepare"]},
        "tests/test_model.py -k 'medusa or training_form or least_squares or state_it_guessed'",
        45,
        "K layers that are one, or a head that starts many minutes behind",
    ),
    9: Exercise(
        "the game",
        {
            "discriminator.py": ["exact_logits", "discriminator_loss", "adversarial_loss"],
            "sampling.py": ["acceptance"],
        },
        "tests/test_training.py -k 'best_discriminator or no_other or taught or own_loss or zeros'",
        50,
        "the head would be taught away from the target, or D trained by the head's gradient",
    ),
    10: Exercise(
        "the joint step",
        {"train.py": ["HeadTraining.joint_step"]},
        "tests/test_training.py -k 'joint_step or nothing_to or slows_down or neither or until_D'",
        45,
        "whoever is not held fixed learns to make the other's work easy",
    ),
    11: Exercise(
        "is it faster?",
        {"costs.py": ["expected_length", "Size.speedup", "fastest"]},
        "tests/test_costs.py tests/test_drafts.py -k 'rates or perfect or useless or cheap'",
        60,
        "tau would be taken for speed",
    ),
    12: Exercise(
        "a tree that pays",
        {"study/judge.py": ["PayingTree.goes_on", "PayingTree.size"]},
        "tests/test_judge.py -k 'pay or on_where or whatever_the_judge'",
        40,
        "tokens would be drafted that cost more than they bring",
    ),
}


@dataclass(frozen=True)
class ExerciseConfig:
    action: str = option(
        "list",
        "what to do",
        choices=["list", "start", "check", "solution", "stop"],
        positional=True,
    )
    number: int = option(0, "of the exercise", positional=True)


# ------------------------------------------------------------------------------------- blanks


def function(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function of this name, a method as Class.name."""
    body = tree.body
    for part in name.split("."):
        node = next(node for node in body if getattr(node, "name", None) == part)
        body = node.body
    return node


def emptied(source: str, names: list[str], number: int) -> str:
    """The source with the bodies of these functions gone; signature and docstring stay."""
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    for node in sorted([function(tree, name) for name in names], key=lambda node: -node.lineno):
        docstring, *body = node.body  # each has one; comments below it go too
        if not body:
            continue
        blank = f"{' ' * body[0].col_offset}raise NotImplementedError('exercise {number}')\n"
        lines[docstring.end_lineno : node.end_lineno] = [blank]
    return "".join(lines)


def of(number: int) -> Exercise:
    if number not in EXERCISES:
        raise UserError(f"there is no exercise {number}: choose from 1 to {len(EXERCISES)}")
    return EXERCISES[number]


def original(number: int, file: str) -> Path:
    return KEPT / str(number) / "original" / file


def begun(number: int) -> bool:
    return all(original(number, file).is_file() for file in of(number).blanks)


def changed(file: str) -> bool:
    """Whether git knows of changes in a file; without git: no."""
    words = ["git", "status", "--porcelain", "--", file]
    try:
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return False
    return found.returncode == 0 and bool(found.stdout.strip())


# ------------------------------------------------------------------------------------ actions


def start(number: int) -> None:
    exercise = of(number)
    for file in exercise.blanks:
        for other in EXERCISES:
            if original(other, file).is_file():
                raise UserError(f"exercise {other} is at work in {file}: stop {other} first")
        if changed(file):
            raise UserError(f"{file} has changes of your own: commit them or put them away first")
    for file, names in exercise.blanks.items():
        source = (ROOT / file).read_text("utf-8")
        original(number, file).parent.mkdir(parents=True, exist_ok=True)
        original(number, file).write_text(source, "utf-8")
        if not exercise.fails:
            (ROOT / file).write_text(emptied(source, names, number), "utf-8")
        print(f"{file}: {', '.join(names)}")
    print(f"check it:    python -m study.exercise check {number}")
    print(f"give it up:  python -m study.exercise solution {number}")
    print(f"put it back: python -m study.exercise stop {number}")


def check_the_rest(number: int) -> None:
    """Refuse to judge a file of which more was changed than was asked for."""
    for file, names in of(number).blanks.items():
        before = original(number, file).read_text("utf-8")
        try:
            now = emptied((ROOT / file).read_text("utf-8"), names, number)
        except SyntaxError as error:
            raise UserError(f"{file}, line {error.lineno}: {error.msg}") from error
        except StopIteration as error:
            raise UserError(f"{file} lacks one of {', '.join(names)}") from error
        if now != emptied(before, names, number):
            raise UserError(f"{file} was changed outside of {', '.join(names)}: put the rest back")


def said_by(tests: list[ElementTree.Element], files: list[str]) -> str:
    """A failed test in words: its name, its cases, its docstring's first line, what it saw where.

    tests: its cases. files: those of the exercise.
    """
    name = tests[0].get("name").partition("[")[0]
    path = ROOT / (tests[0].get("classname").replace(".", "/") + ".py")
    node = function(ast.parse(path.read_text("utf-8")), name)
    story = (ast.get_docstring(node) or "").partition("\n")[0]
    fault = tests[0].find("failure")
    fault = tests[0].find("error") if fault is None else fault
    seen = textwrap.shorten(fault.get("message", ""), 160, placeholder=" ..")
    here = re.findall(rf"^({'|'.join(map(re.escape, files))}):(\d+)", fault.text or "", re.M)
    where = "passed through {}, line {}".format(*here[-1]) if here else ""
    cases = f" ({len(tests)} cases)" if len(tests) > 1 else ""
    words = name.removeprefix("test_").replace("_", " ") + cases
    return "\n".join([f"  - {words}", *(f"      {line}" for line in (story, seen, where) if line)])


def check(number: int) -> bool:
    exercise = of(number)
    if not begun(number):
        raise UserError(f"exercise {number} has not begun: python -m study.exercise start {number}")
    check_the_rest(number)
    files, _, chosen = exercise.tests.partition(" -k ")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        words += [f"--junit-xml={report}", *files.split()]
        words += ["-k", chosen.strip("'")] if chosen else []
        subprocess.run(words, cwd=ROOT, capture_output=True)
        if not report.is_file():
            raise UserError(f"the tests cannot run: {' '.join(words[1:])}")
        tests = list(ElementTree.parse(report).iter("testcase"))
    failed = [t for t in tests if t.find("failure") is not None or t.find("error") is not None]
    if exercise.fails:
        print(f"{len(failed)} of {len(tests)} tests have caught you.")
        return bool(failed)
    if not failed:
        print(f"right: all {len(tests)} tests pass")
        return True
    print(f"{len(failed)} of {len(tests)} tests fail:")
    told = {}
    for test in failed:
        told.setdefault(test.get("name").partition("[")[0], []).append(test)
    for cases in [*told.values()][:5]:
        print(said_by(cases, [*exercise.blanks]))
    print(f"Why it matters: {exercise.why}.")
    return False


def solution(number: int) -> None:
    for file, names in of(number).blanks.items():
        path = original(number, file)
        source = (path if path.is_file() else ROOT / file).read_text("utf-8")
        for name in names:
            print(
                f"# {file}\n{ast.get_source_segment(source, function(ast.parse(source), name))}\n"
            )


def stop(number: int) -> None:
    if not begun(number):
        raise UserError(f"exercise {number} has not begun: there is nothing to put back")
    for file in of(number).blanks:
        mine = KEPT / str(number) / "mine" / file
        mine.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, mine)
        shutil.copyfile(original(number, file), ROOT / file)
        print(f"{file} is as it was; your text: {mine}")
    shutil.rmtree(KEPT / str(number) / "original")


def main() -> None:
    config = parse(ExerciseConfig, about=__doc__)
    if config.action == "list":
        for number, exercise in EXERCISES.items():
            state = " (at work)" if begun(number) else ""
            blanks = ", ".join(name for names in exercise.blanks.values() for name in names)
            print(f"{number:3}  {exercise.title:46} {exercise.minutes:3} min  {blanks}{state}")
        return
    actions = {"start": start, "check": check, "solution": solution, "stop": stop}
    if actions[config.action](config.number) is False:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
