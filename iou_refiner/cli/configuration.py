"""The file that ``--config`` names: a section for each command, and the global options ``seed`` and ``device``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cyclopts.config import Dict, Json, Toml, Yaml

from iou_refiner.checks import MissingPackageError, did_you_mean
from iou_refiner.cli.console import UsageError

_KINDS: dict[str, Any] = {".toml": Toml, ".yaml": Yaml, ".yml": Yaml, ".json": Json}


def read_config(path: Path | None, commands: Iterable[str]) -> tuple[dict[str, Any], list[Any]]:
    """The global options of a config file, and the source of the commands' options.

    Args:
        path: the file, or None.
        commands: names of the sections that it may have.

    Raises:
        UsageError: the file is missing, cannot be read, or holds what is no option.
        MissingPackageError: it is YAML, which nothing here reads.
    """
    if path is None:
        return {}, []
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
    return options, [Dict(values, source=str(path))]


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
