"""Command lines: a frozen dataclass is a script's settings, its flags, its help and its checks.

`option` gives a field its default, its help, its range and its owner. `parse` fills the dataclass
from the command line. `check_ranges` refuses a value out of range, wherever the dataclass is made.
An error that the user can fix is a `UserError`: `run` prints it as one line, with exit status 2.
"""

import argparse
import dataclasses
import math
import os
import re
import signal
import sys
import typing
from operator import ge, gt, le

import torch

BOUNDS = {"above": ("above", gt), "least": ("at least", ge), "most": ("at most", le)}


class UserError(ValueError):
    """An error that the user can fix; its text says what is wrong and what to do."""


def option(default, help: str, *, group=None, of=(), flag=True, **details):
    """A dataclass field that is also a flag.

    `group`: its section in --help. `of`: who records it, see recipe.py. `flag=False`: presets and
    Python set it, the command line does not. `above`, `least`, `most`: its range. The other
    `details` go to argparse: choices, nargs, type. `positional=True`: a plain argument sets it too.
    """
    bounds = {name: details.pop(name) for name in BOUNDS if name in details}
    about = dict(help=help, group=group, of=of, flag=flag, bounds=bounds)
    return dataclasses.field(default=default, metadata={"about": about, "argparse": details})


def check_ranges(config) -> None:
    """Raise UserError for the first field of `config` that is out of the range it states."""
    for field in dataclasses.fields(config):
        bounds, value = field.metadata["about"]["bounds"], getattr(config, field.name)
        if value is None or not bounds:
            continue
        if not math.isfinite(value) or not all(BOUNDS[b][1](value, bounds[b]) for b in bounds):
            wanted = " and ".join(f"{BOUNDS[name][0]} {bounds[name]}" for name in bounds)
            raise UserError(f"--{field.name} is {value}, it must be {wanted}")


def number_or_auto(text: str) -> int | str:
    """The type of an option that may be left to measurement."""
    return text if text == "auto" else int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse(config_class, argv=None, presets: dict | None = None, about="", usual=None):
    """An instance of `config_class` from the command line.

    With `presets`, a dictionary of name -> {field: default}, `--preset NAME` changes the defaults
    before the other flags are read, so that `--preset NAME --help` shows the values in force.
    `usual(argv)` is the preset where none is named; default: the first. `about`: the script's
    docstring, whose first paragraph opens the help.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = "|".join(field.name.replace("_", "[-_]") for field in dataclasses.fields(config_class))
    flag = re.compile(rf"^--({names})(?==|$)")  # --out-dir is --out_dir
    argv = [flag.sub(lambda found: "--" + found[1].replace("-", "_"), word) for word in argv]
    parser = Parser(description=about.split("\n\n")[0], allow_abbrev=False)
    defaults = chosen_preset(argv, presets, usual) if presets else {}
    groups, types = {None: parser}, typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        group = field.metadata["about"]["group"]
        if field.metadata["about"]["flag"]:
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            default = defaults.get(field.name, field.default)
            add_flag(groups[group], field, types[field.name], default)
    parser.set_defaults(**defaults)  # of settings without a flag, too
    return config_class(**vars(parser.parse_args(argv)))


def chosen_preset(argv: list[str], presets: dict, usual) -> dict:
    """The defaults of the preset that the command line names, or of the usual one."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=None)
    named = parser.parse_known_args(argv)[0].preset
    name = named or (usual(argv) if usual else next(iter(presets)))
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(presets)}")
    return presets[name] | {"preset": name}


def add_flag(parser, field, kind, default) -> None:
    """One field as a flag of `parser`, its default shown once."""
    help, details = field.metadata["about"]["help"], dict(field.metadata["argparse"])
    positional = details.pop("positional", False)
    shown = " ".join(map(str, default)) if isinstance(default, (tuple, list)) else default
    told = "default:" in help and default == field.default
    if default is not None and default is not False and not told:
        help = f"{help.split('; default:')[0]} (default: {shown})"
    if kind is bool:
        details["action"] = "store_true"
    elif "type" not in details:  # `int | None` is read as int
        kinds = [k for k in typing.get_args(kind) if k is not type(None)] or [kind]
        details["type"] = typing.get_args(kinds[0])[0] if "nargs" in details else kinds[0]
    # argparse reads help as a format.
    parser.add_argument(f"--{field.name}", default=default, help=help.replace("%", "%%"), **details)
    if positional:
        left_out, read = argparse.SUPPRESS, details.get("type", str)

        def value(text: str):  # argparse reads a default as it does a word
            return text if text == left_out else read(text)

        parser.add_argument(field.name, nargs="?", default=left_out, type=value, help="the same")


def run(main) -> None:
    """Run a script's main(): its exit status is 0, 2 for bad input, 130 if interrupted."""
    # A polite kill is an interrupt, and one is heard where a shell started us with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt as interrupt:
        sys.exit(leave(interrupt))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        sys.exit(fail(f"{reason}: try --device cpu, or less at once (train.py: --batch_tokens)"))
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(fail(error))
    except RuntimeError as error:  # Python 3.11's of an interrupt in a class body of a late import
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        sys.exit(leave(error.__cause__))


def leave(interrupt: KeyboardInterrupt) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # to ask again changes nothing any more
        signal.signal(number, signal.SIG_IGN)
    print(f"\ninterrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
    return 130


def fail(error: Exception | str) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
