"""Where options come from beside the command line: the file that ``--config`` names, and the environment.

A file has a section for each command, and the global options ``seed`` and ``device``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from cyclopts import App, ArgumentCollection, CoercionError
from cyclopts.config import Dict, Env, Json, Toml, Yaml

from iou_refiner.checks import MissingPackageError, did_you_mean
from iou_refiner.cli.console import UsageError

_KINDS: dict[str, Any] = {".toml": Toml, ".yaml": Yaml, ".yml": Yaml, ".json": Json}


def read_config(path: Path | None, commands: Iterable[str]) -> tuple[dict[str, Any], list[Any]]:
    """The global options of a config file, and the sources of the commands' options, the first of which counts.

    Args:
        path: the file, or None.
        commands: names of the sections that it may have.

    Raises:
        UsageError: the file is missing, cannot be read, or holds what is no option.
        MissingPackageError: it is YAML, which nothing here reads.
    """
    others = [Env("IOU_REFINER_"), whole_numbers]
    if path is None:
        return {}, others
    values = _load(path)
    known: dict[str, type] = {"seed": int, "device": str}
    for name in values:
        if name not in known and name not in commands:
            near = did_you_mean(str(name), [*known, *commands])
            raise UsageError(
                f"--config {path}: {name!r} is no command and no global option; there are {', '.join(commands)}, "
                f"{', '.join(known)}.{near}"
            )
    options: dict[str, Any] = {name: values.pop(name) for name in known if name in values}
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, known[name]) or (isinstance(value, int) and value < 0):
            expected = "an integer of 0 or more" if name == "seed" else "a string such as 'cpu'"
            raise UsageError(f"--config {path}: {name} must be {expected}, got {value!r}.")
    return options, [Dict(values, source=str(path)), *others]


def whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """A source of no options that looks at those of all others: cyclopts would round 1.5 where an integer is due.

    Raises:
        CoercionError: a number with a decimal point stands where an integer is due.
    """
    for argument in arguments:
        if {int, float} & _kinds(argument.hint) == {int}:
            for token in argument.tokens:
                if "." in token.value:
                    raise CoercionError(f"expected a whole number, got {token.value}.", argument=argument, token=token)


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint is made of: int and None of ``tuple[int, ...] | None``."""
    inner = get_args(hint)
    return {kind for part in inner for kind in _kinds(part)} if inner else {hint}


def _load(path: Path) -> dict[str, Any]:
    if path.suffix not in _KINDS:
        raise UsageError(f"--config {path}: expected a .toml, .yaml or .json file.")
    if not path.exists():
        raise UsageError(f"--config {path}: no such file.")
    if not path.is_file():
        raise UsageError(f"--config {path}: is no plain file. Name a .toml, .yaml or .json file.")
    if _KINDS[path.suffix] is Yaml:
        try:
            importlib.import_module("yaml")
        except ImportError as error:
            raise MissingPackageError(
                f"--config {path} needs yaml, which is not importable ({error}). pip install pyyaml, or write the "
                "options as .toml or .json."
            ) from None
    try:
        values = _KINDS[path.suffix](path, must_exist=True).config
    except Exception as error:  # three readers with errors of their own
        raise UsageError(f"--config {path} cannot be read ({error}). Correct it there.") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected a section for each command, got {type(values).__name__}.")
    for name, section in values.items():
        if name not in ("seed", "device") and not isinstance(section, dict):
            raise UsageError(f"--config {path}: {name} must be a section of options, got {section!r}.")
    return dict(values)
