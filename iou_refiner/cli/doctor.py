"""What works on this machine: versions, devices, the pooling backends, the adapters."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from iou_refiner import __version__
from iou_refiner.detector.registry import installed_adapters
from iou_refiner.pooling import cuda_kernels
from iou_refiner.pooling.functional import prroi_pool
from iou_refiner.structures import FeatureMaps

_PACKAGES = (
    "torch", "numpy", "pycocotools", "torchvision", "onnxruntime", "cupy-cuda12x", "cupy-cuda13x", "matplotlib",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        versions: of the packages that matter; absent ones are left out.
        devices: torch devices, with their names.
        pooling: for each device, which backend pools there and whether its result is right.
        adapters: installed adapters and what they would import.
        ok: nothing that is present is broken.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    pooling: dict[str, str]
    adapters: dict[str, str]
    ok: bool

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines: list[str] = []
        for part in ("versions", "devices", "pooling", "adapters"):
            lines.append(part)
            lines += [f"  {name}: {value}" for name, value in getattr(self, part).items()]
        return "\n".join([*lines, "all well" if self.ok else "something is broken: see above"])


def examine() -> Diagnosis:
    """Look at this machine; pools a map with a known answer on every device."""
    versions = {"iou-refiner": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    pooling, ok = {}, True
    for name in devices:
        backend, fault = _pool_on(torch.device(name))
        pooling[name] = f"{backend}: {fault or 'right'}"
        ok &= fault is None
    pooling["CuPy kernels"] = cuda_kernels.why_unavailable() or "available"
    adapters = {name: point.value for name, point in installed_adapters().items()}
    return Diagnosis(versions, devices, pooling, adapters, ok)


def _pool_on(device: torch.device) -> tuple[str, str | None]:
    """The backend that pools on a device, and what is wrong with it if anything is.

    A linear map pools to its value at the centre of each bin, and its gradient by the box is known.
    """
    backend = "CuPy kernel" if cuda_kernels.is_available(device) else "portable"
    try:
        ramp = torch.arange(16.0, device=device).expand(1, 1, 16, 16)
        box = torch.tensor([[4.0, 4.0, 12.0, 12.0]], device=device, requires_grad=True)
        pooled = prroi_pool(FeatureMaps((ramp,), (1.0,), ((16, 16),)), box, output_size=2)
        pooled.sum().backward()
        expected = torch.tensor([[5.5, 9.5], [5.5, 9.5]])
        assert box.grad is not None
        gradient = torch.tensor([[2.0, 0.0, 2.0, 0.0]])
        error = max(
            (pooled[0, 0].detach().cpu() - expected).abs().max().item(), (box.grad.cpu() - gradient).abs().max().item()
        )
    except Exception as exception:  # whatever is broken here is what the user came to learn
        return backend, f"{type(exception).__name__}: {exception}"
    return backend, None if error < 1e-4 else f"wrong by {error:.2g}"
