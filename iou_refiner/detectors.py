"""Find the adapter of a detector: from a live object, or from what ``--detector`` says."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from iou_refiner._checks import DataError, did_you_mean
from iou_refiner.extraction import Adapter


def installed_adapters() -> dict[str, EntryPoint]:
    """The adapters on offer: entry points of the group ``iou_refiner.adapters``, by name."""
    return {point.name: point for point in sorted(entry_points(group="iou_refiner.adapters"))}


def as_adapter(detector: Any) -> Adapter:
    """The adapter of a live detector, found by the framework its class comes from.

    An entry point is named after the root package of the framework whose detectors it takes. Something that has the
    methods of :class:`Adapter` is one already.

    Raises:
        TypeError: the framework has no adapter.
    """
    if hasattr(detector, "extract") and hasattr(detector, "run"):
        adapter: Adapter = detector
        return adapter
    roots = {kind.__module__.partition(".")[0] for kind in type(detector).__mro__}
    known = installed_adapters()
    for name in known:
        if name in roots:
            wrap: Callable[[Any], Adapter] = known[name].load()
            return wrap(detector)
    raise TypeError(
        f"No adapter for a detector of type {type(detector).__module__}.{type(detector).__qualname__}. Installed: "
        f"{', '.join(known) or 'none'}. Bring your own: an object with the methods of iou_refiner.Adapter."
    )


def detector_from_spec(spec: str) -> Adapter:
    """The detector that ``--detector`` names.

    Args:
        spec: ``adapter:name`` for an installed adapter (``torchvision:fasterrcnn_resnet50_fpn_v2``,
            ``onnx:yolox.onnx``), or ``package.module:function`` or ``file.py:function``, a function without arguments
            that returns a live detector or an adapter.

    Raises:
        DataError: the spec is malformed, or names what is not there.
    """
    kind, colon, name = (
        spec.rpartition(":") if spec.split(":", 1)[0] not in installed_adapters() else spec.partition(":")
    )
    if not colon or not kind or not name:
        raise DataError(
            f"--detector {spec!r} is not of the form adapter:name, package.module:function or file.py:function. "
            f"Installed adapters: {', '.join(installed_adapters())}."
        )
    if kind in installed_adapters():
        adapter: Adapter = installed_adapters()[kind].load().from_name(name)
        return adapter
    module = _module(kind, spec)
    if not hasattr(module, name):
        raise DataError(f"--detector {spec!r}: {kind} has no function {name!r}.{did_you_mean(name, dir(module))}")
    return as_adapter(getattr(module, name)())


def _module(kind: str, spec: str) -> Any:
    if kind.endswith(".py"):
        path = Path(kind)
        if not path.exists():
            raise DataError(f"--detector {spec!r}: no file {path}.")
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise DataError(f"--detector {spec!r}: {path} is not a Python file.")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
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
