"""What goes out comes back: arrays, dicts, Detections and supervision's, for any boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner import Detections, to_detections, to_numpy, to_supervision
from tests.kit.needs import needs_package


@st.composite
def boxes_of_an_image(draw: st.DrawFn) -> dict[str, np.ndarray]:
    count, seed = draw(st.integers(0, 6)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (count, 2))
    columns = {
        "boxes": np.concatenate([corner, corner + rng.uniform(1, 50, (count, 2))], 1).astype(np.float32).astype(float),
        "scores": rng.random(count).astype(np.float32).astype(float),
        "labels": rng.integers(0, 90, count),
    }  # fmt: skip
    if draw(st.booleans()):
        columns["ious"] = rng.random(count).astype(np.float32).astype(float)
    return columns


def assert_columns(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name])
        assert values.dtype == (np.int64 if name == "labels" else np.float64)


@given(columns=boxes_of_an_image())
def test_every_form_leads_back_to_the_same_arrays(columns: dict[str, np.ndarray]):
    sv = needs_package("supervision", install="pip install -e '.[supervision]'")
    tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
    detections, out = to_detections(columns), to_supervision(columns)
    assert isinstance(detections, Detections)
    assert isinstance(out, sv.Detections)
    for form in (columns, tensors, detections, out, detections.to_dict(), {k: v.tolist() for k, v in columns.items()}):
        assert_columns(to_numpy(form), columns)
        again = to_detections(form)
        assert torch.equal(again.boxes, detections.boxes)
        assert torch.equal(again.labels, detections.labels)


def test_supervision_filters_merges_and_draws_what_it_gets():
    """With its own functions: masks select rows with their IoU, and an annotator takes the names."""
    sv = needs_package("supervision", install="pip install -e '.[supervision]'")
    columns = {"boxes": [[0, 0, 9, 9], [4, 4, 20, 20.0]], "scores": [0.9, 0.4], "labels": [1, 3], "ious": [0.8, 0.6]}
    out = to_supervision(columns, class_names={1: "person"})
    assert out.data["class_name"].tolist() == ["person", "3"]
    sure = out[out.data["iou"] > 0.7]
    assert to_numpy(sure)["ious"].tolist() == pytest.approx([0.8])
    both = sv.Detections.merge([sure, sure])
    assert len(to_detections(both)) == 2
    canvas = np.zeros((30, 30, 3), np.uint8)
    assert sv.BoxAnnotator().annotate(canvas.copy(), out).any()


def test_what_a_detector_returns_with_gradients_is_taken():
    values = {"boxes": torch.rand(2, 4, requires_grad=True), "scores": torch.rand(2), "labels": torch.tensor([1, 2])}
    assert to_numpy(values)["boxes"].shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"boxes": [[1, 2, 3]]}, ValueError, r"`boxes` must have shape \(N, 4\).*got \(1, 3\)"),
        ({"scores": [0.5, 0.5]}, ValueError, r"`scores` must have shape \(1,\).*got \(2,\)"),
        ({"labels": [1.5]}, ValueError, "`labels` must be whole numbers"),
        ({"labels": None}, TypeError, None),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any], error: type, match: str | None):
    columns = {"boxes": [[1, 2, 3, 4.0]], "scores": [0.5], "labels": [1]} | change
    if change.get("labels", 0) is None:
        del columns["labels"]
        match = "boxes, scores, labels; labels missing"
    with pytest.raises(error, match=match):
        to_numpy(columns)


def test_other_things_are_refused_by_name():
    sv = needs_package("supervision", install="pip install -e '.[supervision]'")
    with pytest.raises(TypeError, match="got int"):
        to_numpy(3)
    with pytest.raises(TypeError, match=r"`confidence` of these supervision\.Detections is None"):
        to_numpy(sv.Detections(xyxy=np.zeros((1, 4)), class_id=np.zeros(1, int)))
