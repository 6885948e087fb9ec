"""The shape of the house: who may import whom, what stays light, what lies where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

PACKAGE, ADAPTERS = ROOT / "iou_refiner", ROOT / "adapters"

# Each module may import only those before it.
ORDER = (
    "_version", "_checks", "_files", "boxes", "data", "coco_data", "_json_stream", "coco_reading", "coco", "kernels",
    "_taps", "_portable", "_operator", "pooling", "trunk", "head_file", "predictor", "jitter", "_soft_nms",
    "_suppression", "_suppression_device", "nms", "refine", "views", "extraction", "own", "detectors", "targets",
    "losses", "training", "settings", "stage", "refiner", "rescoring", "findings", "nms_trace", "_results_checks",
    "validation", "evaluation", "ranking", "bootstrap", "tuning", "recipe", "demo_data", "demo_detector",
    "demo_picture", "demo", "doctor", "_console", "cli", "__main__",
)  # fmt: skip
# What must not come with `import iou_refiner`, nor with the commands that promise to answer at once.
HEAVY = {"torch", "cupy", "torchvision", "onnx", "onnxruntime", "matplotlib", "PIL", "pycocotools"}
OPTIONAL = HEAVY - {"torch", "pycocotools"} | {"skimage", "mlxtend", "jinja2"}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of all modules that a file imports; ``from package import module`` counts as ``package.module`` too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    return {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_every_module_has_its_place_in_the_order():
    pass


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_those_before_it(name: str):
    own = {
        m.removeprefix("iou_refiner.").split(".")[0] for m in imports(modules()[name]) if m.startswith("iou_refiner.")
    }
    wrong = {m for m in own & set(ORDER) if ORDER.index(m) >= ORDER.index(name)}
    assert not wrong, f"{name} imports {wrong}, which stand after it"


@pytest.mark.parametrize("name", sorted(modules()))
def test_the_core_knows_no_adapter_and_imports_optional_packages_only_in_functions(name: str):
    # The demo is a user of the package like any other: it builds a torchvision detector and wraps it.
    if not name.startswith("demo"):
        assert not {module for module in imports(modules()[name]) if module.startswith("iou_refiner.adapters")}
    top = {m.split(".")[0] for m in imports(modules()[name], top_level_only=True)}
    assert not top & OPTIONAL


def test_only_kernels_imports_cupy():
    users = {n for n, p in modules().items() if any(m.split(".")[0] == "cupy" for m in imports(p))}
    users |= {p.stem for p in ADAPTERS.glob("*.py") if any(m.split(".")[0] == "cupy" for m in imports(p))}
    assert users <= {"kernels"}


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*.py")), ids=lambda p: p.stem)
def test_an_adapter_imports_its_framework_only_in_functions(path: Path):
    assert not {m.split(".")[0] for m in imports(path, top_level_only=True)} & OPTIONAL


def test_cuda_holds_cuda_and_nothing_else():
    # An __init__.py here would hide NVIDIA's namespace package `cuda`, and with it break `import cupy`.
    files = [p.relative_to(ROOT) for p in (ROOT / "cuda").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert files
    assert [p for p in files if p.suffix not in {".cu", ".cuh"}] == []


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import iou_refiner", HEAVY),
        ("import iou_refiner.cli", HEAVY),
        ("from iou_refiner.cli import app; app.meta(['--help'], result_action='return_value')", HEAVY),
        ("import iou_refiner.validation.validate", HEAVY),
        ("import iou_refiner.evaluation.bootstrap", HEAVY - {"pycocotools"}),
        ("from iou_refiner import *", OPTIONAL),
    ],
)
def test_imports_stay_light(code: str, forbidden: set[str]):
    check = f"{code}\nimport sys\nprint('LOADED', *sorted({forbidden!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_the_light_import_check_can_fail():
    check = f"import torch, sys\nprint('LOADED', *sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED torch"


def test_every_public_name_resolves():
    import iou_refiner

    for name in iou_refiner.__all__:
        assert getattr(iou_refiner, name) is not None
    assert set(iou_refiner.__all__) <= set(dir(iou_refiner))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = iou_refiner.nonsense
