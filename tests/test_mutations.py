"""The table of mutations fits the code, or its proof would be of lines that are gone."""

from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.why}")
def test_each_line_stands_once_where_it_is_said_to_stand(mutation):
    assert (ROOT / mutation.file).read_text("utf-8").count(mutation.line) == 1
    assert mutation.wrong != mutation.line
    for test in mutation.tests.split():
        assert (ROOT / test).is_file()


def test_there_are_enough_of_them():
    assert len(MUTATIONS) >= 40 and len({(m.file, m.wrong) for m in MUTATIONS}) == len(MUTATIONS)
