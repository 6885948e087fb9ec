"""What the adapter asks of Detectron2 beside its detectors: modules, configs, weights, the categories of datasets."""

from __future__ import annotations

import importlib
import math
import pickle
from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner import DataError, MissingPackageError

_COMMIT = "a59f0563"  # of 2024-04-17; sal-detectron2 0.7.2 packages the same code


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
    cfg = module("config").get_cfg()
    try:
        cfg.merge_from_file(path)
    except Exception as error:  # of YAML, of yacs, or an assertion
        raise DataError(f"{path} is not a config of Detectron2 ({error}).") from None
    cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def load(detector: nn.Module, weights: str) -> None:
    """Fill the detector from a checkpoint.

    Raises:
        DataError: it cannot be read, or leaves some of the detector unfilled, which Detectron2 would only log.
    """
    tensors = {name: tensor for name, tensor in detector.state_dict().items() if tensor.is_floating_point()}
    for tensor in tensors.values():
        tensor.fill_(math.nan)
    try:
        module("checkpoint").DetectionCheckpointer(detector).load(weights)
    except (OSError, AssertionError, RuntimeError, pickle.UnpicklingError) as error:
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
