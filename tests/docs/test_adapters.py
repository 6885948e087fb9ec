"""Every snippet of docs/adapters.md runs as it is printed, with small random detectors in place of trained ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from iou_refiner import Adapter, HeadConfig, IoUHead
from iou_refiner.adapters.onnx import OnnxAdapter
from iou_refiner.adapters.onnx.layouts import LAYOUTS
from tests.adapters import (
    cases_custom,
    cases_detectron2,
    cases_mmdet,
    cases_onnx,
    cases_torchvision,
    cases_transformers,
)
from tests.adapters.case import Case, assert_same
from tests.adapters.onnx_graphs import tiny_suppressed, tiny_yolov8
from tests.kit.needs import needs_package
from tests.kit.paths import ROOT

PAGE = (ROOT / "docs" / "adapters.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))


def blocks(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.S)


def head_for(case: Case) -> IoUHead:
    """An untrained head for the feature maps of a detector."""
    features, _, _ = case.adapter.extract(case.images[:1])
    return IoUHead(features.channels, features.strides, HeadConfig(width=4, hidden=(16,), output_size=3))


def run(section: str, number: int = 0, **given: Any) -> dict[str, Any]:
    """The names a snippet leaves behind."""
    names = dict(given)
    exec(blocks(section)[number], names)
    return names


def assert_predicted(ious: Any) -> None:
    ious = torch.as_tensor(ious)
    assert len(ious) >= 2
    assert ((ious >= 0) & (ious <= 1)).all()


def test_the_wraps_have_at_most_five_lines() -> None:
    wraps = {section: blocks(section)[0] for section in SECTIONS if section != "Your own"}
    assert set(wraps) == {"torchvision", "Detectron2", "MMDetection", "transformers", "ONNX"}
    for section, wrap in wraps.items():
        assert len([line for line in wrap.splitlines() if line.strip()]) <= 5, section


def test_torchvision() -> None:
    case = cases_torchvision.CASES["mask_rcnn"]()
    result = run("torchvision", detector=case.adapter.detector, head=head_for(case), images=case.images)["result"]
    assert set(result) == {"boxes", "labels", "scores", "masks", "ious"}
    assert_predicted(result["ious"])


def test_detectron2() -> None:
    case = cases_detectron2.CASES["faster_rcnn_fpn"]()
    with cases_detectron2.detectron2_warns():
        from detectron2.engine import DefaultPredictor

        predictor = DefaultPredictor(cases_detectron2.tiny_config(cases_detectron2.R_CNN))
    predictor.model = case.adapter.detector
    bgr = case.rgb[0][:, :, ::-1]
    assert_predicted(run("Detectron2", predictor=predictor, head=head_for(case), image=bgr)["instances"].ious)


@pytest.mark.filterwarnings(*cases_mmdet.WARNINGS)
def test_mmdetection() -> None:
    case = cases_mmdet.CASES["faster_rcnn"]()
    bgr = case.rgb[0][:, :, ::-1].copy()
    instances = run("MMDetection", detector=case.adapter.detector, head=head_for(case), image=bgr)["instances"]
    assert_predicted(instances.ious)


def test_transformers() -> None:
    case, transformers = cases_transformers.CASES["rt_detr"](), needs_package("transformers")
    pipeline = transformers.ObjectDetectionPipeline(
        case.adapter.model, image_processor=case.adapter.processor, threshold=0.0
    )
    detections = run("transformers", pipeline=pipeline, head=head_for(case), image=case.images[0])["detections"]
    assert {"score", "label", "box", "iou"} == set(detections[0])
    assert_predicted([detection["iou"] for detection in detections])


def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_yolov8(), "yolov8n.onnx")
    case = cases_onnx.CASES["yolov8"]()
    result = run("ONNX", head=head_for(case), rgb=case.rgb[0])["result"]
    assert set(result) == {"boxes", "labels", "scores", "ious"}
    assert_predicted(result["ious"])


def test_onnx_of_another_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_suppressed(), "mine.onnx")
    detector = run("ONNX", 1)["detector"]
    assert (detector.layout.boxes, detector.layout.score_threshold) == ("all_boxes", 0.05)


def test_onnx_layout_beside_the_file(tmp_path: Path) -> None:
    (text,) = blocks("ONNX", "json")
    onnx.save(tiny_yolov8(), tmp_path / "yolov8n.onnx")
    (tmp_path / "yolov8n.layout.json").write_text(text)
    detector = OnnxAdapter.from_name(str(tmp_path / "yolov8n.onnx"))
    assert list(detector.layout.features) == json.loads(text)["features"]
    assert detector.category_ids == {0: 1, 1: 2, 2: 3}


def test_onnx_table_names_every_layout() -> None:
    assert re.findall(r'^\| `"(.*?)"`', SECTIONS["ONNX"], re.M) == list(LAYOUTS)


def test_your_own() -> None:
    case = cases_custom.CASES["centers"]()
    result = run("Your own", detector=case.adapter.detector, head=head_for(case), images=case.images)["result"]
    assert_predicted(result["ious"])


def test_your_own_subclass_does_as_the_adapter_of_the_example() -> None:
    case = cases_custom.CASES["centers"]()
    names = run("Your own", 1, detector=case.adapter.detector, head=head_for(case), images=case.images)
    assert_predicted(names["result"]["ious"])
    adapter = names["CentersAdapter"](case.adapter.detector)
    assert torch.equal(adapter.prepare(case.rgb[0])[0], case.adapter.prepare(case.rgb[0])[0])
    assert (adapter.settings(), adapter.fingerprint()) == (case.adapter.settings(), case.adapter.fingerprint())
    assert_same(adapter.detect(case.images), case.own())
    assert_same(adapter.run(case.own_suppression, case.images), case.own())
    (features, candidates, transforms), expected = (each.extract(case.images) for each in (adapter, case.adapter))
    assert all(map(torch.equal, features.levels, expected[0].levels))
    assert_same([image.to_dict() for image in candidates], [image.to_dict() for image in expected[1]])
    assert transforms == expected[2]


def test_your_own_table_names_every_method_that_a_subclass_needs() -> None:
    named = re.findall(r"^\| `(\w+)\(", SECTIONS["Your own"], re.M)
    assert set(named) == Adapter.__abstractmethods__


def test_your_own_adapter_has_at_most_twenty_lines() -> None:
    """That of the example, from the line that says where it begins."""
    _, _, adapter = (ROOT / "examples" / "custom_adapter.py").read_text().partition("# --- the adapter")
    assert len([line for line in adapter.splitlines()[1:] if line.strip()]) <= 20
