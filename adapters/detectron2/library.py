"""What the adapter asks of Detectron2 beside its detectors: modules, configs, weights, the categories of datasets."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner import DataError, MissingPackageError
from iou_refiner.adapters.weights import read_arrays, tensors_only, trusts_pickles

_COMMIT = "a59f0563"  # of 2024-04-17; sal-detectron2 0.7.2 packages the same code
_MOST_NODES = 100_000  # values in a config
_WITHOUT_TAGS = (
    "Write the value itself in its place. A config that has to run code belongs into a Python file: build the detector "
    "in a function, and name file.py:function."
)


def module(name: str) -> Any:
    """The module ``detectron2.name``, or one sentence on how to come by a Detectron2 that works."""
    try:
        return importlib.import_module(f"detectron2.{name}")
    except (ImportError, AttributeError) as error:  # the latter where Pillow or NumPy dropped what an old one uses
        raise MissingPackageError(
            f"A Detectron2 detector needs detectron2.{name}, which is not importable ({error}). pip install "
            f'--no-build-isolation "setuptools<81" git+https://github.com/facebookresearch/detectron2@{_COMMIT} '
            "(tested: that commit, with torch 2.14)"
        ) from error


def config(name: str) -> Any:
    """The config of ``CONFIG.yaml[:WEIGHTS]``, on the CPU, ``MODEL.WEIGHTS`` being the weights to load."""
    stem, extension, rest = name.partition(".yaml")
    if not extension or (rest and not rest.startswith(":")):
        raise DataError(f"A Detectron2 detector is named by CONFIG.yaml or CONFIG.yaml:WEIGHTS, got {name!r}.")
    path, weights = stem + extension, rest[1:]
    if not Path(path).is_file():
        zoo = module("model_zoo")
        try:
            weights = weights or zoo.get_checkpoint_url(path)
            path = zoo.get_config_file(path)
        except RuntimeError as error:
            raise DataError(f"{path} is neither a file nor a trained config of the model zoo ({error})") from None
    cfg = _safe_config()
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except Exception as error:  # of YAML, of yacs, or an assertion
        tag = _tag_in(error)
        cure = f" {_WITHOUT_TAGS}" if tag else ""
        raise DataError(f"{path} is not a config of Detectron2 ({tag or error}).{cure}") from None
    cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _safe_config() -> Any:
    """Detectron2's defaults, as a config that reads files without running the code that tags in them name.

    The files of the installed model zoo are code as the package is: one of them computes its anchors.
    """
    parent, defaults = module("config").CfgNode, module("config").get_cfg()
    zoo = Path(module("config").__file__).parents[1].joinpath("model_zoo", "configs").resolve()

    class SafeConfig(parent):  # type: ignore[misc, valid-type]
        """Every file is judged by itself, those named by ``_BASE_`` too."""

        @classmethod
        def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
            del allow_unsafe
            trusted = Path(filename).resolve().is_relative_to(zoo)
            if not trusted:
                with cls._open_cfg(filename) as file:
                    _check_yaml(file.read(), filename)
            return super().load_yaml_with_base(filename, allow_unsafe=trusted)

    return SafeConfig(defaults)


def _check_yaml(text: str, name: str) -> None:
    """Raise DataError for a config that unfolds to more than any config holds."""
    yaml = importlib.import_module("yaml")
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_NODES + 1  # until it is known: what holds itself never ends
            parts = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else []
            flat = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            sizes[id(node)] = 1 + sum(map(size, flat))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"{name} holds no settings")
    if size(root) > _MOST_NODES:
        raise DataError(f"{name} unfolds to more than {_MOST_NODES:,} values; write them out without anchors")


def _tag_in(error: Exception) -> str:
    """Which tag a file has that YAML does not know, and where; empty for another error."""
    problem, mark = getattr(error, "problem", None) or "", getattr(error, "problem_mark", None)
    _, told, tag = problem.partition("could not determine a constructor for the tag ")
    if not told or mark is None:
        return ""
    tag = tag.strip("'").replace("tag:yaml.org,2002:", "!!")
    return f"the tag {tag} in line {mark.line + 1} of {mark.name} is no plain value, and may run code"


def _checkpointer(detector: nn.Module, weights: str) -> Any:
    """Detectron2's own, which reads tensors and arrays and runs nothing that a file names."""
    parent = module("checkpoint").DetectionCheckpointer

    class SafeCheckpointer(parent):  # type: ignore[misc, valid-type]
        def _load_file(self, filename: str) -> Any:
            if filename.endswith(".pkl") and not trusts_pickles():
                return _as_checkpoint(read_arrays(filename, weights))
            with tensors_only(weights, filename):
                return super()._load_file(filename)

    return SafeCheckpointer(detector)


def _as_checkpoint(data: dict[str, Any]) -> dict[str, Any]:
    """The two kinds of .pkl files, as DetectionCheckpointer tells them apart: of Detectron2, or of Detectron 1."""
    if "model" in data and "__author__" in data:
        return data
    blobs = {name: value for name, value in data.get("blobs", data).items() if not name.endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def load(detector: nn.Module, weights: str) -> None:
    """Fill the detector from a checkpoint.

    Raises:
        DataError: it cannot be read, or leaves some of the detector unfilled, which Detectron2 would only log.
    """
    tensors = {name: tensor for name, tensor in detector.state_dict().items() if tensor.is_floating_point()}
    for tensor in tensors.values():
        tensor.fill_(math.nan)
    try:
        _checkpointer(detector, weights).load(weights)
    except DataError:
        raise
    except (OSError, AssertionError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"The weights {weights!r} cannot be read ({error}).") from None
    unfilled = [name for name, tensor in tensors.items() if tensor.isnan().any()]
    if unfilled:
        raise DataError(
            f"The weights {weights!r} leave {len(unfilled)} of {len(tensors)} tensors of the detector unfilled "
            f"({unfilled[0]}, ...). Name the weights trained with this config: CONFIG.yaml:WEIGHTS."
        )


def category_ids(dataset: str) -> dict[int, int] | None:
    """Category id of each label, as far as Detectron2 knows the dataset."""
    to_label = module("data").MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    return {label: category for category, label in to_label.items()} if to_label else None
