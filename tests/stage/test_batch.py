"""The boxes of many images in one table: the same as going over the images one by one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.head.iou_head import Prediction
from iou_refiner.stage.batch import FlatBatch
from iou_refiner.structures import Detections

CPU = torch.device("cpu")
_edge = st.integers(-3, 12).map(float) | st.sampled_from([float("nan"), float("inf"), -1e30])
_row = st.tuples(
    st.tuples(_edge, _edge, _edge, _edge), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.sampled_from([-7, 0, 3, 2**31])
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Detections], list[tuple[int, int]]]:
    """Candidates and sizes of a few images, some of them without candidates."""
    candidates, with_source = [], draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    for rows in draw(st.lists(st.lists(_row, max_size=8), min_size=1, max_size=4)):
        boxes, scores, labels = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        candidates.append(
            Detections(
                torch.tensor(boxes, dtype=dtype).reshape(-1, 4),
                torch.tensor(scores, dtype=dtype),
                torch.tensor(labels, dtype=torch.int64),
                source=torch.arange(len(rows)) * 10 if with_source else None,
            )
        )
    sizes = [draw(st.tuples(st.integers(1, 12), st.integers(1, 12))) for _ in candidates]
    return candidates, sizes


def predicted(batch: FlatBatch) -> FlatBatch:
    """With a prediction that tells every row from every other."""
    iou = torch.linspace(0, 1, len(batch))
    return batch.with_prediction(Prediction(iou, 1 - iou))


def rows_of(batch: FlatBatch) -> list[dict[str, Any]]:
    columns = [getattr(batch, field.name).tolist() for field in fields(batch)]
    names = [field.name for field in fields(batch)]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


@settings(max_examples=50)
@given(batches())
def test_a_batch_is_the_images_one_after_the_other(drawn: tuple[list[Detections], list[tuple[int, int]]]) -> None:
    candidates, sizes = drawn
    batch = FlatBatch.of(candidates, sizes, CPU)
    assert len(batch) == sum(map(len, candidates))
    row = 0
    for index, (image, (height, width)) in enumerate(zip(candidates, sizes, strict=True)):
        clipped = clip_boxes(image.boxes.float(), (height, width))
        for own in range(len(image)):
            torch.testing.assert_close(batch.boxes[row], clipped[own], rtol=0, atol=0, equal_nan=True)
            assert batch.scores[row] == image.scores[own]
            assert batch.labels[row] == image.labels[own]
            assert batch.image_index[row] == index
            assert batch.limits[row].tolist() == [width, height, width, height]
            assert batch.row[row] == row
            row += 1
    assert torch.isnan(batch.iou).all()
    assert torch.isnan(batch.ranking).all()
    assert torch.equal(batch.finite(), torch.isfinite(batch.boxes).all(1))  # all scores are


@settings(max_examples=50)
@given(batches())
def test_splitting_undoes_joining(drawn: tuple[list[Detections], list[tuple[int, int]]]) -> None:
    candidates, sizes = drawn
    batch = predicted(FlatBatch.of(candidates, sizes, CPU))
    first = 0
    for detections, image, size in zip(batch.split(candidates), candidates, sizes, strict=True):
        boxes = clip_boxes(image.boxes.float(), size).to(image.boxes.dtype)
        torch.testing.assert_close(detections.boxes, boxes, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(detections.scores, image.scores)
        assert detections.scores.dtype == image.scores.dtype
        assert torch.equal(detections.labels, image.labels)
        assert detections.ious is not None
        assert torch.equal(detections.ious, batch.iou[first : first + len(image)])
        assert (detections.source is None) == (image.source is None)
        if image.source is not None and detections.source is not None:
            assert torch.equal(detections.source, image.source)
        first += len(image)


@settings(max_examples=50)
@given(drawn=batches(), k=st.integers(0, 5), data=st.data())
def test_what_is_left_of_a_batch_goes_back_to_its_images(
    drawn: tuple[list[Detections], list[tuple[int, int]]], k: int, data: st.DataObject
) -> None:
    """Some rows dropped, the others by score, the first k of each image: against a loop over the images."""
    candidates, sizes = drawn
    whole = FlatBatch.of(candidates, sizes, CPU)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole))), dtype=torch.bool)
    batch = whole[mask].by_score()
    split = batch[batch.topk_rows(k)].split(candidates)
    first = 0
    for detections, image in zip(split, candidates, strict=True):
        rows = [row for row in range(len(image)) if mask[first + row]]
        rows = sorted(rows, key=lambda row: -float(image.scores[row]))[:k]  # sorted keeps ties in their order
        assert detections.scores.tolist() == image.scores[rows].tolist()
        assert detections.labels.tolist() == image.labels[rows].tolist()
        if image.source is not None and detections.source is not None:
            assert detections.source.tolist() == image.source[rows].tolist()
        first += len(image)


@settings(max_examples=50)
@given(batches())
def test_by_score_orders_every_image_and_mixes_none(drawn: tuple[list[Detections], list[tuple[int, int]]]) -> None:
    batch = predicted(FlatBatch.of(*drawn, CPU))
    expected = sorted(range(len(batch)), key=lambda row: (int(batch.image_index[row]), -float(batch.scores[row])))
    ordered = batch.by_score()
    for field in fields(batch):
        column = getattr(batch, field.name)[expected]
        torch.testing.assert_close(getattr(ordered, field.name), column, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ordered.by_score().row, ordered.row)


@settings(max_examples=50)
@given(batches())
def test_groups_are_images_and_labels(drawn: tuple[list[Detections], list[tuple[int, int]]]) -> None:
    batch = FlatBatch.of(*drawn, CPU)
    group = batch.group().tolist()
    keys = list(zip(batch.image_index.tolist(), batch.labels.tolist(), strict=True))
    for one, key in zip(group, keys, strict=True):
        for other, its in zip(group, keys, strict=True):
            assert (one == other) == (key == its)


@settings(max_examples=50)
@given(drawn=batches(), data=st.data())
def test_a_box_moves_inside_its_image_or_stays(
    drawn: tuple[list[Detections], list[tuple[int, int]]], data: st.DataObject
) -> None:
    candidates, sizes = drawn
    batch = predicted(FlatBatch.of(candidates, sizes, CPU))
    boxes = [data.draw(st.tuples(_edge, _edge, _edge, _edge)) for _ in range(len(batch))]
    moved = batch.moved_to(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    for row, box in enumerate(boxes):
        clipped = clip_boxes(torch.tensor([box]), sizes[int(batch.image_index[row])])
        expected = clipped[0] if valid_boxes(clipped)[0] else batch.boxes[row]
        torch.testing.assert_close(moved.boxes[row], expected, rtol=0, atol=0, equal_nan=True)
    for name in ("scores", "labels", "image_index", "row", "iou", "ranking"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))


@settings(max_examples=50)
@given(drawn=batches(), data=st.data())
def test_some_rows_take_the_boxes_and_predictions_of_others(
    drawn: tuple[list[Detections], list[tuple[int, int]]], data: st.DataObject
) -> None:
    batch = predicted(FlatBatch.of(*drawn, CPU))
    rows = data.draw(st.lists(st.integers(0, max(len(batch) - 1, 0)), unique=True, max_size=len(batch)))
    some = torch.tensor(rows, dtype=torch.int64)
    other = batch[some].replace(boxes=torch.rand(len(rows), 4), scores=torch.full((len(rows),), 9.0))
    other = other.with_prediction(Prediction(torch.rand(len(rows)), torch.rand(len(rows))))
    updated = batch.updated(some, other)
    for row in range(len(batch)):
        for name in ("boxes", "iou", "ranking"):
            expected = getattr(other, name)[rows.index(row)] if row in rows else getattr(batch, name)[row]
            torch.testing.assert_close(getattr(updated, name)[row], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(updated.scores, batch.scores)
    assert not (batch.boxes == updated.boxes).all(1)[some].any()
