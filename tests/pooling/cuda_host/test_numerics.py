"""The kernels, compiled for the host and called through their own launcher, against oracles and the portable path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.pooling import cuda_kernels, portable
from iou_refiner.pooling.cuda_kernels import Variant
from iou_refiner.pooling.inputs import PoolInputs
from tests.kit.reference import prroi_pool_reference
from tests.pooling.cuda_host import measure
from tests.pooling.cuda_host.host import Library, planted
from tests.pooling.cuda_host.oracle import Case, axis

INF, NAN = float("inf"), float("nan")
# Half an ulp of the storage type, relative to the result.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
BOXES = [
    [3.0, 5.0, 40.0, 33.0],  # inside
    [8.0, 8.0, 16.0, 16.0],  # edges on cell borders
    [2.0, 6.0, 30.0, 34.0],  # edges on cell centres
    [0.0, 0.0, 60.0, 48.0],  # the whole map
    [-40.0, -30.0, 90.0, 80.0],  # beyond it on all sides
    [-9.0, 20.0, 3.0, 22.0],  # across one border
    [200.0, 10.0, 220.0, 20.0],  # outside
    [20.3, 20.1, 20.31, 20.11],  # a small part of a cell
    [1.0, 40.0, 59.0, 40.5],  # long and flat
    [-1e7, -1e7, 1e7, 1e7],  # diverged
    [30.0, 5.0, 20.0, 9.0],  # inverted
    [30.0, 5.0, 40.0, 5.0],  # empty
]


def example(dtype: torch.dtype, channels: int, seed: int, boxes: Tensor | None = None) -> PoolInputs:
    """Four maps of two images, laid out level by level, and boxes that cycle through them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[12, 15], [6, 8], [12, 15], [6, 8]], dtype=torch.int32)
    offsets = torch.tensor([0, 360, 180, 408])
    strides = torch.tensor([4.0, 8.0, 4.0, 8.0])
    table = (torch.rand(456, channels, generator=generator) * 8 - 4).to(dtype)
    boxes = torch.tensor(BOXES) if boxes is None else boxes
    return PoolInputs(table, sizes, offsets, strides, boxes, torch.arange(len(boxes), dtype=torch.int32) % 4, 0.5)


def check_against_oracle(inputs: PoolInputs, bins: int, seed: int = 1) -> None:
    """All three kernels within float32 accuracy of float64, and the rounding of the storage type."""
    case, dtype = measure.case_of(inputs), inputs.table.dtype
    pooled = cuda_kernels.forward(inputs, bins)
    grad = (torch.rand(pooled.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)
    wide = grad.double().numpy()
    for got, exact in (
        (pooled, case.forward(bins)),
        (cuda_kernels.backward_boxes(grad, inputs), case.backward_boxes(wide)),
        (cuda_kernels.backward_table(grad, inputs), case.backward_table(wide)),
    ):
        expected = torch.from_numpy(exact)
        scale = max([1.0, *expected.abs().flatten().tolist()])
        torch.testing.assert_close(got.double(), expected, rtol=1.01 * ROUNDING[got.dtype], atol=1e-5 * scale)


@pytest.mark.parametrize("channels", [1, 5, 24])
@pytest.mark.parametrize("dtype", sorted(cuda_kernels.DTYPES, key=str), ids=str)
@pytest.mark.parametrize("bins", [1, 3, 5, 7, 14])
def test_every_variant_matches_the_oracle(on_host: Library, bins: int, dtype: torch.dtype, channels: int) -> None:
    check_against_oracle(example(dtype, channels, bins), bins)


@pytest.mark.parametrize("bins", [1, 3, 5, 7, 14])
def test_without_fused_multiply_adds(unfused: Library, bins: int) -> None:
    with unfused.installed():
        check_against_oracle(example(torch.float32, 8, bins), bins)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 5), (torch.float16, 16), (torch.bfloat16, 16)])
def test_storage_without_fused_multiply_adds(unfused: Library, dtype: torch.dtype, channels: int) -> None:
    with unfused.installed():
        check_against_oracle(example(dtype, channels, 3)._replace(shift=0.0), 7)


@pytest.mark.parametrize("channels", [256, 260, 1028])
def test_more_channels_than_a_block_has_threads(on_host: Library, channels: int) -> None:
    check_against_oracle(example(torch.float32, channels, 0, torch.tensor(BOXES[:3])), 7)


edges = st.one_of(st.floats(-30, 90, width=32), st.integers(-8, 24).map(lambda cell: 4.0 * cell + 2.0))
extents = st.one_of(st.floats(0.0078125, 80, width=32), st.sampled_from([0.0, 4.0, 28.0, 1e4, 1e8]))
boxes = st.lists(
    st.tuples(edges, edges, extents, extents).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]), max_size=5
)


@settings(deadline=None, max_examples=60)
@given(boxes=boxes, shift=st.sampled_from([0.0, 0.5]), stride=st.sampled_from([1.0, 4.0, 8.0, 11.3, 0.3]))
def test_any_box_matches_the_oracle(fused: Library, boxes: list[list[float]], shift: float, stride: float) -> None:
    inputs = example(torch.float32, 4, 0, torch.tensor(boxes).reshape(-1, 4))
    with fused.installed():
        check_against_oracle(inputs._replace(strides=inputs.strides * stride / 4, shift=shift), 3)


@pytest.mark.parametrize("dtype", sorted(cuda_kernels.DTYPES, key=str), ids=str)
def test_same_results_as_the_portable_path(on_host: Library, dtype: torch.dtype) -> None:
    rows = [*BOXES, [NAN, 1, 2, 3], [1, 1, INF, 9], [-INF, -INF, INF, INF]]
    inputs = example(dtype, 16, 5, torch.tensor(rows, dtype=torch.float32))
    pooled, expected = cuda_kernels.forward(inputs, 7), portable.forward(inputs, 7)
    close = {"rtol": 2.02 * ROUNDING[dtype], "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(pooled, expected, **close)
    grad = torch.ones_like(pooled)
    for name in ("backward_boxes", "backward_table"):
        got, wanted = getattr(cuda_kernels, name)(grad, inputs), getattr(portable, name)(grad, inputs)
        torch.testing.assert_close(got, wanted, **close | {"atol": 1e-4})


def test_box_policy(on_host: Library) -> None:
    rows = [[9, 9, 9, 20], [9, 9, 3, 20], [NAN, 0, 9, 9], [0, 0, 9, INF], [-INF, 0, INF, 9], *[[3, 3, 40, 40]] * 3]
    inputs = example(torch.float32, 4, 0, torch.tensor(rows, dtype=torch.float32))
    # A map lies in memory before the first, where an index of -1 must not find it.
    sizes, offsets, strides = (torch.cat([item[:1], item])[1:] for item in inputs[1:4])
    map_index = torch.tensor([0, 1, 2, 3, 0, -1, 4, 2**31 - 1], dtype=torch.int32)
    inputs = inputs._replace(sizes=sizes, offsets=offsets, strides=strides, map_index=map_index)
    pooled = cuda_kernels.forward(inputs, 3)
    gradient = cuda_kernels.backward_boxes(torch.ones_like(pooled), inputs)
    to_table = cuda_kernels.backward_table(torch.ones_like(pooled), inputs)
    assert (pooled[:2] == 0).all()
    assert (gradient[:2] == 0).all()
    assert pooled[2:].isnan().all()
    assert gradient[2:].isnan().all()
    assert (to_table == 0).all()


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("sizes", (1, 0), 60),
        ("sizes", (1, 1), -1),
        ("offsets", (1,), 409),
        ("offsets", (1,), -1),
        ("strides", (1,), 0.0),
    ],
)
def test_a_map_that_leaves_the_table_does_not_exist(
    on_host: Library, field: str, index: tuple[int, ...], value: float
) -> None:
    inputs = example(torch.float32, 4, 0)
    getattr(inputs, field)[index] = value
    pooled = cuda_kernels.forward(inputs, 3)
    broken = inputs.map_index == 1
    assert pooled[broken].isnan().all()
    assert pooled[~broken].isfinite().all()


def test_inputs_are_left_alone_and_runs_repeat_bit_for_bit(on_host: Library) -> None:
    inputs = example(torch.float32, 8, 0)
    before = [item.clone() for item in inputs[:-1]]
    grad = torch.rand(len(BOXES), 7, 7, 8, generator=torch.Generator().manual_seed(0))
    runs = [
        (
            cuda_kernels.forward(inputs, 7),
            cuda_kernels.backward_boxes(grad, inputs),
            cuda_kernels.backward_table(grad, inputs),
        )
        for _ in range(3)
    ]
    for run in runs[1:]:
        for item, first in zip(run, runs[0], strict=True):
            torch.testing.assert_close(item, first, rtol=0, atol=0)
    for item, original in zip(inputs[:-1], before, strict=True):
        torch.testing.assert_close(item, original, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 0x7C00), (torch.bfloat16, 0x7F80)])
def test_every_16_bit_number_survives_a_round_trip(on_host: Library, dtype: torch.dtype, bits: int) -> None:
    # One cell, and a box so small on its centre that its weight is 1.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[(numbers.view(torch.int16) & bits) != bits]  # finite ones; inf times the weights beside it is NaN
    box = torch.tensor([[0.5, 0.5, 0.50000006, 0.50000006]])
    one = torch.ones(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    inputs = PoolInputs(numbers[None].contiguous(), *one, box, torch.zeros(1, dtype=torch.int32), 0.5)
    pooled = cuda_kernels.forward(inputs, 1)
    torch.testing.assert_close(pooled.flatten().float(), numbers.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_round_to_the_nearest_16_bit_number(on_host: Library, dtype: torch.dtype) -> None:
    # The mean of two neighbouring cells, exact in float32; many of them are ties.
    pairs = torch.randint(-(2**15), 2**15, (2, 8192), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    pairs = pairs.view(dtype).nan_to_num(0, 1, -1).clamp(-1e4, 1e4)
    pairs[1, ::2] = pairs[0, ::2] + pairs[0, ::2] * torch.finfo(dtype).eps
    sizes = torch.tensor([[1, 2]], dtype=torch.int32)
    box = torch.tensor([[0.5, 0.5, 1.5, 0.50000006]])
    one = torch.zeros(1, dtype=torch.int64), torch.ones(1), box, torch.zeros(1, dtype=torch.int32)
    pooled = cuda_kernels.forward(PoolInputs(pairs.contiguous(), sizes, *one, 0.5), 1)
    torch.testing.assert_close(pooled.flatten(), pairs.float().mean(0).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [30, 7, 0.7, 0.05, 0.01])
def test_accuracy_does_not_depend_on_the_size_of_the_box(on_host: Library, size: float) -> None:
    errors = measure.accuracy(size, count=12)
    assert errors.forward <= 1e-5
    assert errors.constant <= 1e-6
    assert errors.gradient <= 1e-5


def loads(library: Library, box: list[float]) -> int:
    inputs = measure.one_map(torch.zeros(measure.HEIGHT * measure.WIDTH, 4), torch.tensor([box]))
    library.take_loads()
    cuda_kernels.forward(inputs, 7)
    cuda_kernels.backward_boxes(torch.zeros(1, 7, 7, 4), inputs)
    return library.take_loads()


def test_a_diverged_or_invalid_box_costs_no_more_than_an_ordinary_one(on_host: Library) -> None:
    ordinary = loads(on_host, [0, 0, measure.WIDTH * measure.STRIDE, measure.HEIGHT * measure.STRIDE])
    assert ordinary > measure.WIDTH * measure.HEIGHT
    for size in (1e6, 1e9, 1e30, 3e38):
        assert 0 < loads(on_host, [-size, -size, size, size]) <= ordinary
    for box in ([NAN, 0, 9, 9], [0, 0, INF, 9], [-INF, -INF, INF, INF], [1e30, 1e30, 3e38, 3e38], [9, 9, 0, 0]):
        assert loads(on_host, box) == 0


def test_at_most_half_the_loads_of_2018(on_host: Library) -> None:
    rng = np.random.default_rng(0)
    chosen = torch.cat([measure.boxes_of(size, 8, rng) for size in (16, 20, 24)])  # what FPN gives a level
    on_host.take_loads()
    cuda_kernels.forward(measure.one_map(torch.zeros(measure.HEIGHT * measure.WIDTH, 4), chosen), 7)
    assert on_host.take_loads() <= 0.5 * measure.loads_of_2018(chosen)


# ---- The oracle and the host answer for themselves. ----


def test_the_oracle_agrees_with_an_independent_one_and_with_finite_differences() -> None:
    rng = np.random.default_rng(0)
    feature, box = rng.normal(size=(6, 9, 2)), np.array([1.3, -0.4, 6.9, 4.2])
    one = np.array([[6, 9]], np.int32), np.zeros(1, np.int64), np.ones(1)

    def pool(corners: np.ndarray) -> Case:
        return Case(feature.reshape(54, 2), *one, corners[None], np.zeros(1, np.int32), 0.0)

    pooled = pool(box).forward(5)
    np.testing.assert_allclose(
        pooled[0].transpose(2, 0, 1), prroi_pool_reference(feature.transpose(2, 0, 1), box, 5), atol=1e-12
    )
    grad, step = rng.normal(size=pooled.shape), 1e-6
    numeric = [
        ((pool(box + d).forward(5) - pool(box - d).forward(5)) * grad).sum() / (2 * step) for d in np.eye(4) * step
    ]
    np.testing.assert_allclose(pool(box).backward_boxes(grad)[0], numeric, atol=1e-6)
    table = pool(box).backward_table(grad)
    np.testing.assert_allclose((table.reshape(feature.shape) * feature).sum(), (pooled * grad).sum(), atol=1e-10)
    np.testing.assert_allclose(axis(-1.0, 1.0, 3, 1).weight, [[0.5, 0.25, 0.0]], atol=1e-15)


def test_the_host_notices_a_divergent_barrier(tmp_path_factory: pytest.TempPathFactory) -> None:
    barrier = "    __syncthreads();\n    const int items"
    fault = {barrier: f"    if (threadIdx.x < 7) return;\n{barrier}"}
    library = Library(tmp_path_factory.mktemp("diverged"), [Variant(torch.float32, 3, 4)], faults=fault)
    with library.installed(), pytest.raises(RuntimeError, match=r"prroi_forward: divergent barrier"):
        cuda_kernels.forward(example(torch.float32, 4, 0), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items[:-1], "takes 11 arguments, got 10"),
        (lambda items: (*items[:2], np.int64(items[2]), *items[3:]), "argument 2 has 8 bytes, the kernel takes 4"),
    ],
)
def test_the_host_notices_wrong_arguments(on_host: Library, monkeypatch, change, message: str) -> None:
    def launch(name, variant, device, grid, threads, items):
        on_host.launch(name, variant, device, grid, threads, change(items))

    monkeypatch.setattr(cuda_kernels, "_launch", launch)
    with pytest.raises(RuntimeError, match=message):
        cuda_kernels.forward(example(torch.float32, 4, 0), 3)


def test_a_fault_must_find_its_place() -> None:
    with pytest.raises(ValueError, match="no longer contain 'nowhere'"):
        planted("text", {"nowhere": ""})
