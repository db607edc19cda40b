"""Promises about the code base as a whole: what is read, in which order, and what may need what.

Each limit on a single file was kept while the project grew from 11 files to 30 of equal rank. So
the limits here are on the whole: files on top, flags of a script, README's length, imports.
"""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

from bench import BenchConfig
from recipe import TrainConfig
from speculate import SpeculateConfig
from study.ablation import AblationConfig

ROOT = Path(__file__).parent.parent
WINGS = ("targets", "plumbing", "study")
TOP = sorted(ROOT.glob("*.py"))
SOURCES = TOP + [path for wing in WINGS for path in sorted((ROOT / wing).glob("*.py"))]
# The files that are read, in this order; recipe.py is a table to look things up in.
ORDER = ("speculate", "sampling", "drafts", "model", "draft_head", "discriminator", "train")
ORDER += ("costs", "bench")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & {module_of(source) for source in SOURCES}


IMPORTS = {module_of(path): imports_of(path) for path in SOURCES}
# Concepts may import each other; of everything else they know plumbing alone.
CONCEPTS = {"model", "sampling", "draft_head", "discriminator", "drafts", "costs"}


def may_import(importer: str, imported: str) -> bool:
    wing, other = (name.split(".")[0] for name in (importer, imported))
    if importer == "bench":
        return imported != "train"
    if wing == "study":
        return True
    allowed = {
        "plumbing": {"plumbing"},
        "targets": CONCEPTS | {"plumbing", "targets"},
        "recipe": CONCEPTS | {"plumbing"},
        "speculate": CONCEPTS | {"plumbing", "targets"},
        "train": CONCEPTS | {"plumbing", "targets", "recipe"},
    }
    return other in allowed.get(wing, CONCEPTS | {"plumbing"})


# ------------------------------------------------------------------------------- what needs what


@pytest.mark.parametrize("importer", IMPORTS)
def test_imports_go_downwards_only(importer):
    for imported in IMPORTS[importer]:
        assert may_import(importer, imported), f"{importer} imports {imported}"


def test_no_imports_go_in_a_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"a circle: {left}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("wing", ["targets", "plumbing"])
def test_targets_and_plumbing_take_values_and_never_the_settings(wing):
    """Were the settings object passed along, a reader would have to follow it everywhere."""
    for path in (ROOT / wing).glob("*.py"):
        if path.name == "cli.py":  # which makes such objects
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.arg) and node.arg == "config":
                assert ast.unparse(node.annotation or ast.Constant("")) in (
                    "GPTConfig",
                    "HeadConfig",
                )


def test_running_needs_torch_numpy_tiktoken_and_matplotlib_only():
    """The reader of pretrained files needs more, and asks for it only when it is called."""
    allowed = set(sys.stdlib_module_names) | {path.stem for path in TOP} | set(WINGS)
    allowed |= {"torch", "numpy", "tiktoken", "matplotlib"}
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        optional = {"gguf", "safetensors", "jinja2"} if path.name == "pretrained.py" else set()
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} has a relative import"
                names = [node.module]
            here = allowed if node in tree.body else allowed | optional
            assert {name.split(".")[0] for name in names} <= here, f"{path.name}: {names}"


def test_decoding_does_not_wait_for_matplotlib():
    """It takes a second to import, and speculate.py draws nothing."""
    seen, waiting = set(), ["speculate"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting += IMPORTS[name] - seen
    for name in seen:
        path = ROOT / (name.replace(".", "/") + ".py")
        assert "import matplotlib" not in path.read_text("utf-8"), name


# ------------------------------------------------------------------------------------- its size


def test_at_most_ten_files_lie_on_top():
    assert len(TOP) <= 10
    assert {path.stem for path in TOP} == {*ORDER, "recipe"}


@pytest.mark.parametrize(
    "config", [TrainConfig, SpeculateConfig, BenchConfig, AblationConfig], ids=lambda c: c.__name__
)
def test_a_script_has_at_most_thirty_flags_and_ten_settings_without_one(config):
    flags = [field.metadata["about"]["flag"] for field in dataclasses.fields(config)]
    assert sum(flags) <= 30 and len(flags) - sum(flags) <= 10


def test_every_setting_without_a_flag_is_listed():
    text = (ROOT / "study/README.md").read_text("utf-8")
    for field in dataclasses.fields(TrainConfig):
        if not field.metadata["about"]["flag"]:
            assert f"`{field.name}`" in text, field.name


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_source_is_too_long_to_be_read_at_once_nor_too_wide(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 450
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_readme_is_a_front_door():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 12_000
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith("|") and "](" not in line:
            assert len(line) <= 100, line


# ----------------------------------------------------------------------------------- its order


def test_there_is_one_reading_order():
    """README's table and the last words of each file's docstring lead the same way."""
    for name, following in zip(ORDER, ORDER[1:]):
        docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text("utf-8")))
        assert docstring.endswith(f"Read next: {following}.py."), name
    assert "Read next" not in (ROOT / f"{ORDER[-1]}.py").read_text("utf-8")
    table = re.findall(r"^\| \d+ \| \[(\w+)\.py\]", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert table == list(ORDER)
    for path in SOURCES:
        if path not in TOP:
            assert "Read next" not in path.read_text("utf-8"), path.name
