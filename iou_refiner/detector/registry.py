"""Find the adapter of a detector: from a live object, or from what ``--detector`` says."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from iou_refiner.checks import DataError, did_you_mean
from iou_refiner.detector.adapter import Adapter

# A module, or a file, whose path may hold a colon; its function; the function's argument.
_FUNCTION = re.compile(r"(.+?\.py|[\w.]+):(\w+)(?::(.+))?")


def installed_adapters() -> dict[str, EntryPoint]:
    """The adapters on offer: entry points of the group ``iou_refiner.adapters``, by name."""
    return {point.name: point for point in sorted(entry_points(group="iou_refiner.adapters"))}


def as_adapter(detector: Any) -> Adapter:
    """The adapter of a live detector, found by the framework its class comes from.

    An entry point is named after the root package of the framework whose detectors it takes. An :class:`Adapter` is
    returned as it is.

    Raises:
        TypeError: the framework has no adapter.
    """
    if isinstance(detector, Adapter):
        return detector
    roots = {kind.__module__.partition(".")[0] for kind in type(detector).__mro__}
    known = installed_adapters()
    for name in known:
        if name in roots:
            wrap: Callable[[Any], Adapter] = known[name].load()
            return wrap(detector)
    raise TypeError(
        f"No adapter for a detector of type {type(detector).__module__}.{type(detector).__qualname__}. Installed: "
        f"{', '.join(known) or 'none'}. For a detector of your own see iou_refiner.adapters.custom.CustomAdapter."
    )


def detector_from_spec(spec: str) -> Adapter:
    """The detector that ``--detector`` names.

    A function, its module and the config of mmdet are code, which is run; all else that a spec names is data, of which
    nothing runs (docs/trust.md).

    Args:
        spec: ``adapter:name``, the name being up to the installed adapter: ``torchvision:NAME[:WEIGHTS.pth]``,
            ``detectron2:CONFIG.yaml[:WEIGHTS]``, ``mmdet:CONFIG.py[:WEIGHTS]``, ``transformers:FOLDER_OR_NAME``,
            ``onnx:FILE``. Or ``package.module:function`` or ``file.py:function``, a function that returns a live
            detector or an adapter; packages are looked for in the working directory too. What follows another colon,
            as in ``file.py:function:weights.pth``, is the function's only argument.

    Raises:
        DataError: the spec is malformed, or names what is not there.
    """
    known = installed_adapters()
    kind, _, name = spec.partition(":")
    if kind in known and name:
        return _named(known[kind], name, spec)
    parts = _FUNCTION.fullmatch(spec)
    if not parts:
        raise DataError(
            f"--detector {spec!r} is not of the form adapter:name, package.module:function[:argument] or "
            f"file.py:function[:argument]. Installed adapters: {', '.join(known)}."
        )
    where, name, argument = parts.groups()
    module = _module(where, spec)
    make = getattr(module, name, None)
    if not callable(make):
        raise DataError(f"--detector {spec!r}: {where} has no function {name!r}.{did_you_mean(name, dir(module))}")
    detector = make() if argument is None else make(argument)
    try:
        return as_adapter(detector)
    except TypeError as error:
        raise DataError(f"--detector {spec!r}: {error}") from error


def _named(point: EntryPoint, name: str, spec: str) -> Adapter:
    try:
        adapter: Adapter = point.load().from_name(name)
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        raise DataError(f"--detector {spec!r}: {error}") from error
    return adapter


def _module(kind: str, spec: str) -> Any:
    if kind.endswith(".py"):
        return _module_of_file(Path(kind), spec)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # `python -m` has it, a console script has not; last, so that it hides nothing
    try:
        return importlib.import_module(kind)
    except ModuleNotFoundError as error:
        if error.name and kind.split(".")[0] != error.name.split(".")[0]:
            raise
        known = list(installed_adapters())
        raise DataError(
            f"--detector {spec!r}: neither an adapter nor a module is called {kind!r}.{did_you_mean(kind, known)} "
            f"Installed adapters: {', '.join(known)}."
        ) from None


def _module_of_file(path: Path, spec: str) -> Any:
    if not path.is_file():
        raise DataError(f"--detector {spec!r}: no file {path}.")
    # Under a name of its own, or a file called torch.py would hide torch.
    file = importlib.util.spec_from_file_location(f"detector_in_{path.stem}", path)
    if file is None or file.loader is None:
        raise DataError(f"--detector {spec!r}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(file)
    sys.modules[file.name] = module  # where dataclasses and pickle look for it
    file.loader.exec_module(module)
    return module
