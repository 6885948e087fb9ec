"""What ``--detector`` may say, and what it answers to what it may not."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from iou_refiner import DataError
from iou_refiner.adapters.custom import CustomAdapter
from iou_refiner.detector import registry
from iou_refiner.detector.registry import as_adapter, detector_from_spec, installed_adapters
from tests.kit.paths import ROOT
from tests.kit.toys import ToyDetector


class Named:
    """An adapter that only remembers what it was called."""

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def from_name(cls, name: str) -> Named:
        if name == "broken":
            raise ValueError("Unknown model broken")
        if name == "missing":
            raise DataError("missing.bin cannot be read.")
        return cls(name)


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all frameworks had adapters, that of each being :class:`Named`."""
    kinds = ("torchvision", "detectron2", "mmdet", "transformers", "onnx")
    points = {kind: EntryPoint(kind, f"{__name__}:Named", "iou_refiner.adapters") for kind in kinds}
    monkeypatch.setattr(EntryPoint, "load", lambda self: Named)
    monkeypatch.setattr(registry, "installed_adapters", lambda: points)


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(
    "spec",
    [
        "torchvision:fasterrcnn_resnet50_fpn_v2",
        "detectron2:COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "detectron2:config.yaml:weights.pkl",
        "mmdet:configs/retinanet.py",
        "mmdet:configs/retinanet.py:https://where.org/weights.pth",
        "transformers:PekingU/rtdetr_r50vd",
        "onnx:C:\\models\\yolox.onnx",
    ],
)
def test_a_name_reaches_its_adapter_whole(spec: str) -> None:
    assert detector_from_spec(spec).name == spec.split(":", 1)[1]


@pytest.mark.usefixtures("adapters")
def test_what_an_adapter_refuses_is_told_with_the_spec() -> None:
    with pytest.raises(DataError, match=r"--detector 'onnx:broken': Unknown model broken"):
        detector_from_spec("onnx:broken")
    with pytest.raises(DataError, match=r"^missing\.bin cannot be read\.$"):
        detector_from_spec("onnx:missing")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "is not of the form adapter:name"),
        ("yolox.onnx:", "is not of the form adapter:name"),
        ("onnx:", "is not of the form adapter:name"),
        (":make", "is not of the form adapter:name"),
        ("json:loads:", "is not of the form adapter:name"),
        ("torchvison:fasterrcnn", "neither an adapter nor a module is called 'torchvison'. Did you mean 'torchvision'"),
        ("nowhere.py:make", "no file nowhere.py"),
        ("json:lodas", "json has no function 'lodas'. Did you mean 'loads'"),
        ("json:__name__", "json has no function '__name__'"),
        ("builtins:dict", "--detector 'builtins:dict': No adapter for a detector of type builtins.dict.*CustomAdapter"),
    ],
)
def test_a_wrong_spec_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detector_from_spec(spec)


def test_a_function_in_a_file(tmp_path: Path) -> None:
    """Whatever the file is called, and with dataclasses, which look for their module."""
    (tmp_path / "torch.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from tests.kit.toys import ToyDetector\n\n@dataclass\nclass Some:\n    field: ClassVar[int] = 1\n\n"
        "def make():\n    return ToyDetector({})\n"
    )
    assert isinstance(detector_from_spec(f"{tmp_path / 'torch.py'}:make"), ToyDetector)
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize("argument", ["runs/weights.pth", "C:\\weights.pth", "https://where.org/weights.py:1"])
def test_a_function_takes_what_follows_it(tmp_path: Path, argument: str) -> None:
    (tmp_path / "C:").mkdir()
    (tmp_path / "C:" / "made.py").write_text(
        "from tests.kit.toys import ToyDetector\n\ndef make(argument):\n"
        "    detector = ToyDetector({})\n    detector.made_from = argument\n    return detector\n"
    )
    adapter: Any = detector_from_spec(f"{tmp_path / 'C:' / 'made.py'}:make:{argument}")
    assert adapter.made_from == argument


def test_a_function_in_a_package_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_project").mkdir()
    (tmp_path / "some_project" / "models.py").write_text(
        "from tests.kit.toys import ToyDetector\ndef mine(): return ToyDetector({})"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert isinstance(detector_from_spec("some_project.models:mine"), ToyDetector)


def test_the_error_of_a_users_own_code_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        detector_from_spec(f"{tmp_path / 'mine.py'}:make")
    (tmp_path / "mine.py").write_text("def make(): raise TypeError('mine')\n")
    with pytest.raises(TypeError, match=r"^mine$"):
        detector_from_spec(f"{tmp_path / 'mine.py'}:make")


def test_the_example_of_a_custom_adapter() -> None:
    assert isinstance(detector_from_spec(f"{ROOT / 'examples' / 'custom_adapter.py'}:adapter"), CustomAdapter)


def test_an_adapter_is_its_own_adapter() -> None:
    adapter: Any = ToyDetector({})
    assert as_adapter(adapter) is adapter


class Lookalike:
    """Has all that an adapter has, and is none."""

    detector, category_ids, device, training, name = torch.nn.Linear(1, 1), None, torch.device("cpu"), False, "mine"
    prepare = twin = transforms = settings = to = fingerprint = detect = run = extract = lambda self, *_: None


@pytest.mark.parametrize(
    ("unknown", "name"), [(torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"), (Lookalike(), ".*Lookalike")]
)
def test_an_object_nobody_knows_is_named(unknown: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"No adapter for a detector of type {name}.*CustomAdapter"):
        as_adapter(unknown)


def test_the_adapters_of_the_package_are_installed() -> None:
    assert {"onnx", "torchvision"} <= installed_adapters().keys()
