"""The table of mutations fits the code, or its proof would be of lines that are gone."""

import ast
from pathlib import Path

import pytest
from mutations import ANSWERS, MUTATIONS

from study.exercise import EXERCISES, function

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.why}")
def test_each_line_stands_once_where_it_is_said_to_stand(mutation):
    assert (ROOT / mutation.file).read_text("utf-8").count(mutation.line) == 1
    assert mutation.wrong != mutation.line
    files, _, _ = mutation.tests.partition(" -k ")
    for test in files.split():
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text("utf-8")
        assert not name or f"\ndef {name}(" in text


def test_there_are_enough_of_them():
    different = {(m.file, m.wrong, m.tests) for m in MUTATIONS}
    assert len(MUTATIONS) >= 40 and len(different) == len(MUTATIONS)


@pytest.mark.parametrize("number", EXERCISES)
def test_each_function_of_an_exercise_has_a_wrong_answer(number):
    for file, names in EXERCISES[number].blanks.items():
        source = (ROOT / file).read_text("utf-8")
        for name in names:
            node = function(ast.parse(source), name)
            body = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n"
            mine = [m for m in ANSWERS if m.file == file and m.line.split("\n\n")[0] in body]
            assert any(m.tests == EXERCISES[number].tests for m in mine), name
