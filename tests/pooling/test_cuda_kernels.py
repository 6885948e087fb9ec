"""The launcher: what it checks, what it hands over, and what it does without CuPy or without a driver.

What the kernels compute is tested in tests/pooling/cuda_host, on the host; the tests marked gpu repeat it on a device.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iou_refiner.pooling import cuda_kernels, portable
from iou_refiner.pooling.cuda_kernels import Variant
from iou_refiner.pooling.inputs import PoolInputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def example(dtype: torch.dtype = torch.float32, channels: int = 8, device: torch.device = CPU) -> PoolInputs:
    """Two maps, and six boxes on them: inside, on borders, beyond, tiny, empty and invalid."""
    rows = [[3, 5, 40, 33], [0, 0, 60, 48], [-40, -30, 90, 80], [20, 20, 20.1, 20.1], [9, 9, 3, 9], [np.nan, 0, 1, 1]]
    generator = torch.Generator().manual_seed(0)
    inputs = PoolInputs(
        torch.rand(228, channels, generator=generator).to(dtype),
        torch.tensor([[12, 15], [6, 8]], dtype=torch.int32),
        torch.tensor([0, 180]),
        torch.tensor([4.0, 8.0]),
        torch.tensor(rows, dtype=torch.float32),
        torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.int32),
        0.5,
    )
    return on(device, inputs)


def on(device: torch.device, inputs: PoolInputs) -> PoolInputs:
    return PoolInputs(*(item.to(device) if isinstance(item, Tensor) else item for item in inputs))


class Recorder:
    """Takes the place of the launch and remembers every call."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def __call__(self, name: str, variant: Variant, device: Any, grid: Any, threads: int, arguments: Any) -> None:
        self.calls.append(SimpleNamespace(name=name, variant=variant, grid=grid, threads=threads, arguments=arguments))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cuda_kernels, "_launch", recorder)
    return recorder


# ---- Launches. ----


def test_forward_hands_over_its_arguments_in_order(recorder: Recorder) -> None:
    inputs = example()
    output = cuda_kernels.forward(inputs, 7)
    (call,) = recorder.calls
    counts = np.int64(228), np.int32(2)  # rows, and loads of a row
    expected = (inputs.table, *counts, *inputs[1:4], np.int32(2), *inputs[4:6], np.float32(0.5), output)
    assert (call.name, call.variant) == ("prroi_forward", Variant(torch.float32, 7, 4))
    for got, wanted in zip(call.arguments, expected, strict=True):
        assert type(got) is type(wanted)
        if isinstance(wanted, Tensor):
            assert got.data_ptr() == wanted.data_ptr()
        else:
            assert got == wanted


@pytest.mark.parametrize(
    ("boxes", "channels", "grid"),
    [(6, 8, (6, 1)), (6, 256, (6, 13)), (1000, 256, (1000, 3)), (5000, 1024, (5000, 1)), (1, 100_000, (1, 2048))],
)
def test_few_boxes_are_cut_into_slices(recorder: Recorder, boxes: int, channels: int, grid: tuple[int, int]) -> None:
    on_first = {"boxes": torch.zeros(boxes, 4), "map_index": torch.zeros(boxes, dtype=torch.int32)}
    inputs = example(channels=channels)._replace(table=torch.zeros(1, channels), **on_first)
    cuda_kernels.forward(inputs, 7)
    assert recorder.calls[0].grid == grid


@pytest.mark.parametrize(
    ("dtype", "channels", "lanes"),
    [(torch.float32, 8, 4), (torch.float32, 6, 1), (torch.float16, 8, 8), (torch.bfloat16, 12, 1)],
)
def test_wide_loads_where_channels_allow(recorder: Recorder, dtype: torch.dtype, channels: int, lanes: int) -> None:
    inputs = example(dtype, channels)
    grad = cuda_kernels.forward(inputs, 3)
    cuda_kernels.backward_boxes(grad, inputs)
    cuda_kernels.backward_table(grad, inputs)
    assert [call.variant for call in recorder.calls] == [Variant(dtype, 3, lanes)] * 3


def test_single_loads_where_the_address_does_not_allow(recorder: Recorder) -> None:
    inputs = example()._replace(table=torch.zeros(229 * 8)[1 : 1 + 228 * 8].view(228, 8))
    cuda_kernels.forward(inputs, 3)
    assert recorder.calls[0].variant.lanes == 1


def test_gradients_are_launched_over_boxes_and_over_rows(recorder: Recorder) -> None:
    inputs, grad = example(channels=520), torch.zeros(6, 3, 3, 520)
    assert cuda_kernels.backward_boxes(grad, inputs).shape == (6, 4)
    assert cuda_kernels.backward_table(grad, inputs).shape == (228, 520)
    over_boxes, over_rows = recorder.calls
    assert (over_boxes.name, over_boxes.grid, over_boxes.threads) == ("prroi_backward_boxes", (6, 1), 256)
    assert (over_rows.name, over_rows.grid, over_rows.threads) == ("prroi_backward_table", (228, 3), 64)


def test_a_gradient_of_any_layout_is_made_contiguous(recorder: Recorder) -> None:
    inputs, grad = example(), torch.rand(6, 8, 3, 3).permute(0, 2, 3, 1)
    cuda_kernels.backward_boxes(grad, inputs)
    torch.testing.assert_close(recorder.calls[0].arguments[0], grad.contiguous(), rtol=0, atol=0)
    assert recorder.calls[0].arguments[0].is_contiguous()


def test_boxes_of_float64_get_their_gradient_in_float64(recorder: Recorder) -> None:
    inputs = example()
    inputs = inputs._replace(boxes=inputs.boxes.double())
    assert cuda_kernels.backward_boxes(torch.zeros(6, 3, 3, 8), inputs).dtype == torch.float64
    assert recorder.calls[0].arguments[8].dtype == torch.float32


def test_nothing_to_do_launches_nothing(recorder: Recorder) -> None:
    inputs = example()._replace(boxes=torch.zeros(0, 4), map_index=torch.zeros(0, dtype=torch.int32))
    grad = cuda_kernels.forward(inputs, 7)
    assert grad.shape == (0, 7, 7, 8)
    assert cuda_kernels.backward_boxes(grad, inputs).shape == (0, 4)
    torch.testing.assert_close(cuda_kernels.backward_table(grad, inputs), torch.zeros_like(inputs.table))
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("table", torch.zeros(228, 8, dtype=torch.float64), TypeError, "`table` must be float32, .*got torch.float64"),
        ("table", torch.zeros(8, 228).t(), ValueError, r"`table` must be contiguous .*got shape \(228, 8\)"),
        ("sizes", torch.zeros(2, 2, dtype=torch.int64), TypeError, "`sizes` must be torch.int32, got torch.int64"),
        ("offsets", torch.zeros(3, dtype=torch.int64), ValueError, r"`offsets` must have shape \(2,\), got \(3,\)"),
        ("strides", torch.zeros(2, dtype=torch.float64), TypeError, "`strides` must be torch.float32"),
        ("boxes", torch.zeros(6, 5), ValueError, r"`boxes` must have shape \(6, 4\), got \(6, 5\)"),
        ("map_index", torch.zeros(6, dtype=torch.int64), TypeError, "`map_index` must be torch.int32"),
        ("map_index", torch.zeros(6, dtype=torch.int32, device="meta"), ValueError,
         "`map_index` is on meta but `table`"),
    ],
)  # fmt: skip
def test_wrong_arguments_never_reach_a_kernel(
    recorder: Recorder, field: str, value: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cuda_kernels.forward(example()._replace(**{field: value}), 7)
    assert recorder.calls == []


@pytest.mark.parametrize("backward", [cuda_kernels.backward_boxes, cuda_kernels.backward_table])
@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.zeros(6, 3, 3, 8).half(), TypeError, "`grad` must be torch.float32, got torch.float16"),
        (torch.zeros(6, 8, 3, 3), ValueError, r"`grad` must have shape \(6, 8, 8, 8\), got \(6, 8, 3, 3\)"),
        (torch.zeros(6), ValueError, r"`grad` must have shape \(6, 1, 1, 8\), got \(6,\)"),
    ],
)
def test_wrong_gradients_never_reach_a_kernel(
    recorder: Recorder, backward: Any, grad: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backward(grad, example())
    assert recorder.calls == []


def test_more_than_the_counters_hold_is_refused(recorder: Recorder) -> None:
    wide = torch.empty(228, 2**31, device="meta")
    inputs = on(wide.device, example(channels=1))._replace(table=wide)
    with pytest.raises(ValueError, match=r"`output_size` \(7\) squared times C \(2147483648\) is too large"):
        cuda_kernels.forward(inputs, 7)


# ---- CuPy, imitated. ----


class FakeCupy:
    """As much of CuPy as the launcher uses, writing down what happens."""

    def __init__(self, *, version: int) -> None:
        self.log: list[Any] = []
        streams = SimpleNamespace(from_external=lambda s: self._use(s.__cuda_stream__())) if version == 14 else object()
        self.cuda = SimpleNamespace(Stream=streams, ExternalStream=lambda pointer: self._use(pointer))

    @contextmanager
    def _use(self, stream: Any) -> Iterator[None]:
        self.log.append(("stream", stream))
        yield
        self.log.append("stream left")

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> Any:
        self.log.append(("compile", "prroi_forward" in code, options))

        def get_function(name: str) -> Any:
            return lambda grid, block, packed: self.log.append((name, grid, block, packed))

        return SimpleNamespace(get_function=get_function)


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A torch that has a device; the log holds the devices that became current."""
    log: list[Any] = []

    @contextmanager
    def guard(device: Any) -> Iterator[None]:
        log.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    monkeypatch.setattr(cuda_kernels, "is_available", lambda device: True)
    cuda_kernels._kernel.cache_clear()
    yield log
    cuda_kernels._kernel.cache_clear()


@pytest.mark.parametrize(("version", "stream"), [(14, (0, 1234)), (13, 1234)])
def test_a_launch_uses_the_stream_and_device_of_torch(
    monkeypatch: pytest.MonkeyPatch, fake_device: list[Any], version: int, stream: Any
) -> None:
    cupy = FakeCupy(version=version)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    variant, tensor = Variant(torch.float16, 5, 8), torch.zeros(3)
    for _ in range(2):
        cuda_kernels._launch("prroi_forward", variant, torch.device("cuda", 1), (2, 3), 256, (tensor, np.int32(7)))
    launched = ("prroi_forward", (2, 3), (256,), (np.uint64(tensor.data_ptr()), np.int32(7)))
    compiled = ("compile", True, variant.options)
    assert cupy.log == [
        ("stream", stream),
        compiled,
        launched,
        "stream left",
        ("stream", stream),
        launched,
        "stream left",
    ]
    assert {type(item) for item in cupy.log[2][3]} == {np.uint64, np.int32}
    assert fake_device == [torch.device("cuda", 1)] * 2


def test_every_variant_has_options_of_its_own() -> None:
    variants = [Variant(d, p, n) for d in cuda_kernels.DTYPES for p in (3, 7) for n in (1, 4)]
    assert len({variant.options for variant in variants}) == len(variants)


# ---- Without CuPy, without a driver. ----


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_touches_neither_cupy_nor_cuda() -> None:
    code = (
        "import sys, torch, iou_refiner\n"
        "from iou_refiner.pooling import cuda_kernels, functional\n"
        "assert not cuda_kernels.is_available(torch.device('cpu'))\n"
        "print('cupy' in sys.modules, torch.cuda.is_initialized(), cuda_kernels.why_unavailable.cache_info().misses)"
    )
    assert python(code) == "False False 0"


def test_without_cupy_the_reason_names_the_extra() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['cupy'] = None\n"
        "torch.version.cuda, torch.cuda.is_available = '13.0', lambda: True\n"
        "from iou_refiner.pooling import cuda_kernels\n"
        "print(cuda_kernels.is_available(torch.device('cuda')), cuda_kernels.why_unavailable())"
    )
    reason = python(code)
    assert reason.startswith("False CuPy is not importable")
    assert reason.endswith('pip install "iou-refiner[cuda13]"')


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_with_cupy_and_no_driver_the_reason_says_so() -> None:
    code = (
        "import torch, cupy\n"
        "torch.version.cuda, torch.cuda.is_available = '13.0', lambda: True\n"
        "from iou_refiner.pooling import cuda_kernels\n"
        "print(cuda_kernels.is_available(torch.device('cuda')), cuda_kernels.why_unavailable())"
    )
    assert python(code).startswith("False CuPy finds no driver or no run-time compiler (cudaErrorInsufficientDriver")


def test_cpu_tensors_are_refused_without_asking_cuda() -> None:
    with pytest.raises(RuntimeError, match=r"cannot run on cpu: they take CUDA tensors"):
        cuda_kernels.forward(example(), 7)


def test_a_missing_source_names_where_it_was_sought(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(cuda_kernels, "__file__", str(tmp_path / "package" / "pooling" / "cuda_kernels.py"))
    with pytest.raises(FileNotFoundError, match=r"prroi_pool.cu is neither in .*package nor beside it"):
        cuda_kernels.source()


@pytest.mark.parametrize("place", ["package/cuda", "cuda"])
def test_the_source_is_found_installed_and_in_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, place: str
) -> None:
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "prroi_pool.cu").write_text("found")
    monkeypatch.setattr(cuda_kernels, "__file__", str(tmp_path / "package" / "pooling" / "cuda_kernels.py"))
    assert cuda_kernels.source() == "found"


# ---- On a device. ----

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not cuda_kernels.is_available(CUDA), reason=f"NOT RUN, NO GPU: {cuda_kernels.why_unavailable()}"
    ),
]


class TestOnDevice:
    pytestmark = gpu

    def run(self, inputs: PoolInputs) -> tuple[Tensor, ...]:
        pooled = cuda_kernels.forward(inputs, 7)
        grad = torch.ones_like(pooled)
        return pooled, cuda_kernels.backward_boxes(grad, inputs), cuda_kernels.backward_table(grad, inputs)

    @pytest.mark.parametrize("dtype", sorted(cuda_kernels.DTYPES, key=str), ids=str)
    @pytest.mark.parametrize("channels", [8, 5, 256])
    def test_same_results_as_the_portable_path(self, dtype: torch.dtype, channels: int) -> None:
        inputs = example(dtype, channels)
        pooled = portable.forward(inputs, 7)
        grad = torch.ones_like(pooled)
        expected = (
            pooled,
            portable.backward_boxes(grad, inputs),
            portable.backward_table(grad, inputs),
        )
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        for got, wanted in zip(self.run(on(CUDA, inputs)), expected, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=1e-3, equal_nan=True)

    def test_ten_runs_give_the_same_bits(self) -> None:
        inputs = example(channels=256, device=CUDA)
        first = self.run(inputs)
        for _ in range(9):
            for got, wanted in zip(self.run(inputs), first, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)

    def test_work_is_ordered_on_the_current_stream(self) -> None:
        inputs = example(channels=256, device=CUDA)
        expected = cuda_kernels.forward(inputs, 7)
        torch.cuda.synchronize()
        stream, table = torch.cuda.Stream(), torch.zeros_like(inputs.table)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            table.copy_(inputs.table)
            pooled = cuda_kernels.forward(inputs._replace(table=table), 7)
        stream.synchronize()
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)

    def test_a_cuda_graph_replays_it(self) -> None:
        inputs = example(channels=256, device=CUDA)
        expected = self.run(inputs)  # compiles, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.run(inputs)
        for item in captured:
            item.zero_()
        graph.replay()
        for got, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN, needs two GPUs")
    def test_the_second_device_answers_too(self) -> None:
        first, second = (self.run(example(device=torch.device("cuda", index))) for index in (0, 1))
        for got, wanted in zip(second, first, strict=True):
            assert got.device.index == 1
            torch.testing.assert_close(got.cpu(), wanted.cpu(), equal_nan=True)
