"""Pooling in every precision and mode of torch, and what its operators promise to torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iou_refiner.pooling import operator, portable
from iou_refiner.pooling.functional import prroi_pool
from iou_refiner.pooling.inputs import PoolInputs
from iou_refiner.pooling.table import FeatureTable
from tests.pooling.maps import maps_of, random_map


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_tables_are_pooled_in_float32_and_rounded_once(dtype: torch.dtype, step: float) -> None:
    feature = random_map().to(dtype)
    boxes = torch.tensor([[1.2, 2.3, 9.8, 7.1], [3.0, 3.0, 3.01, 3.01], [100.0, 100, 120, 130]], requires_grad=True)
    wide = prroi_pool(maps_of(feature.float()), boxes)
    narrow = prroi_pool(maps_of(feature), boxes)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wide, rtol=step, atol=1e-7)
    (slope,) = torch.autograd.grad(narrow.float().sum(), boxes)
    (expected,) = torch.autograd.grad(wide.sum(), boxes)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, expected)
    weights = maps_of(feature.clone().requires_grad_())
    prroi_pool(weights, boxes.detach()).float().sum().backward()
    assert weights.levels[0].grad is not None
    assert weights.levels[0].grad.dtype == dtype


def test_of_a_half_table_only_the_rows_touched_are_widened() -> None:
    table = random_map().to(torch.float16)[0].flatten(1).t().contiguous()
    row = torch.tensor([7, 3, 3, 200], dtype=torch.int32)
    features, place = portable._widened(table, row)
    assert features.dtype == torch.float32
    assert len(features) == 3
    assert torch.equal(features[place], table[row].float())
    assert portable._widened(table.float(), row)[1] is row


def test_half_boxes_are_widened_before_any_geometry() -> None:
    boxes = torch.tensor([[100.0, 50, 203, 99]], dtype=torch.float16)
    features = maps_of(random_map(), strides=(16.0,))
    torch.testing.assert_close(prroi_pool(features, boxes), prroi_pool(features, boxes.float()), rtol=0, atol=0)


def test_same_value_in_every_mode() -> None:
    features, boxes = maps_of(random_map()), torch.tensor([[1.2, 2.3, 9.8, 7.1]])
    plain = prroi_pool(features, boxes)
    with torch.no_grad():
        assert torch.equal(prroi_pool(features, boxes), plain)
    with torch.inference_mode():
        assert torch.equal(prroi_pool(features, boxes), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prroi_pool(features, boxes), plain)
    assert plain.is_contiguous(memory_format=torch.channels_last)


def two_maps() -> PoolInputs:
    table = FeatureTable.from_maps(maps_of(random_map(5, 6, 2, images=2)))
    boxes = torch.tensor([[1.2, 2.3, 3.8, 4.1], [0.0, 0, 6, 5], [4.0, 4, 3, 3]])
    index = torch.tensor([0, 1, 1], dtype=torch.int32)
    return PoolInputs(table.cells, table.sizes, table.offsets, table.strides, boxes, index, 0.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from opcheck's own clones
def test_the_operators_keep_their_promises_to_torch() -> None:
    inputs = two_maps()
    grad = torch.randn(3, 2, 2, 2)
    torch.library.opcheck(operator._grad_table, (grad, *inputs))
    for keep in (True, False):
        _, kept = operator.pool(*inputs, 2, keep)
        torch.library.opcheck(operator._grad_boxes, (grad, *inputs, kept))
    inputs.table.requires_grad_()
    inputs.boxes.requires_grad_()
    for keep in (True, False):
        torch.library.opcheck(operator.pool, (*inputs, 2, keep))


def test_the_operator_refuses_an_index_outside_its_maps() -> None:
    inputs = two_maps()._replace(map_index=torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(IndexError, match=r"must lie in \[0, 1\]"):
        operator.pool(*inputs, 2, False)


def test_compiles_without_a_graph_break() -> None:
    def value(feature: Tensor, boxes: Tensor, image: Tensor) -> Tensor:
        return prroi_pool(maps_of(feature), boxes, image_index=image, output_size=3).square().sum()

    def run(function: Any) -> list[Tensor]:
        feature, boxes = random_map(images=2).requires_grad_(), torch.tensor([[1.2, 2, 9, 7.1], [0.0, 0, 6, 5]])
        result = function(feature, boxes.requires_grad_(), torch.tensor([0, 1]))
        return [result, *torch.autograd.grad(result, (feature, boxes))]

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(value), run(compiled), strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_compiled_once_for_any_number_of_boxes() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    features, compiled = maps_of(random_map()), torch.compile(prroi_pool, fullgraph=True, dynamic=True, backend=backend)
    for count in (5, 6, 9):  # none of them the size of another axis
        boxes = torch.tensor([[1.2, 2, 9, 7.1]]).repeat(count, 1).requires_grad_()
        torch.testing.assert_close(compiled(features, boxes), prroi_pool(features, boxes))
    assert len(graphs) == 1
