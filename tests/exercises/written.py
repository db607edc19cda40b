"""What a student wrote for a project: NAME in projects/NAME.py, beside the code."""

import importlib.util
from pathlib import Path

import pytest

PROJECTS = Path(__file__).parent.parent.parent / "projects"


def written(name: str):
    """The function or class NAME of projects/NAME.py."""
    path = PROJECTS / f"{name}.py"
    if not path.is_file():
        pytest.fail(f"write {path} first: EXERCISES.md says what it has to hold", pytrace=False)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
