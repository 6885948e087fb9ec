"""The shape of the house: which folder may import which, how large things are, what stays light, what lies where."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

PACKAGE, ADAPTERS = ROOT / "iou_refiner", ROOT / "adapters"

# The folders, and the modules at the root: each imports only itself and those before it.
ORDER = (
    "checks", "files", "progress", "parallel", "numpy_boxes", "boxes", "structures", "pooling", "siblings", "head",
    "stage", "coco", "connectors", "detector", "evaluation", "validation", "rescoring", "training", "refiner",
    "reporting", "verbs", "demo", "cli", "__main__",
)  # fmt: skip
# What must not come with `import iou_refiner`, nor with the commands that promise to answer at once.
HEAVY = {"torch", "cupy", "torchvision", "onnx", "onnxruntime", "matplotlib", "PIL", "pycocotools"}
OPTIONAL = HEAVY - {"torch", "pycocotools"} | {"skimage", "mlxtend", "jinja2"}
# Sizes from which on a reader loses the thread.
MOST_MODULES_AT_THE_ROOT, LONGEST_FUNCTION, LONGEST_FILE = 8, 45, 260


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of all modules that a file imports; ``from package import module`` counts as ``package.module`` too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    """The folder of the package a file is in, or the module it is at the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


MODULES = [path for path in python_files(PACKAGE) if path != PACKAGE / "__init__.py"]
every_module = pytest.mark.parametrize("path", MODULES, ids=named)


def test_every_folder_has_its_place_in_the_order():
    assert {unit(path) for path in MODULES} == set(ORDER)


@every_module
def test_a_module_imports_only_folders_before_its_own(path: Path):
    units = {m.removeprefix("iou_refiner.").split(".")[0] for m in imports(path) if m.startswith("iou_refiner.")}
    wrong = {other for other in units & set(ORDER) if ORDER.index(other) > ORDER.index(unit(path))}
    assert not wrong, f"{named(path)} imports {wrong}, which stand after {unit(path)}"


def test_no_module_imports_itself_in_a_circle():
    name_of = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
    }
    names = set(name_of.values())
    graph = {name: imports(path, top_level_only=True) & names - {name} for path, name in name_of.items()}
    while leaves := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


@every_module
def test_the_core_knows_no_adapter_and_imports_optional_packages_only_in_functions(path: Path):
    # The demo is a user of the package like any other: it builds a torchvision detector and wraps it.
    if unit(path) != "demo":
        assert not {module for module in imports(path) if module.startswith("iou_refiner.adapters")}
    top = {m.split(".")[0] for m in imports(path, top_level_only=True)}
    assert not top & OPTIONAL


def test_only_the_cuda_kernels_import_cupy():
    users = {p.stem for p in python_files(PACKAGE, ADAPTERS) if any(m.split(".")[0] == "cupy" for m in imports(p))}
    assert users == {"cuda_kernels"}


@pytest.mark.parametrize("path", python_files(ADAPTERS), ids=named)
def test_an_adapter_imports_its_framework_only_in_functions(path: Path):
    frameworks = OPTIONAL | {"detectron2", "mmdet", "mmengine", "mmcv", "transformers"}
    assert not {m.split(".")[0] for m in imports(path, top_level_only=True)} & frameworks


def test_cuda_holds_cuda_and_nothing_else():
    # An __init__.py here would hide NVIDIA's namespace package `cuda`, and with it break `import cupy`.
    files = [p.relative_to(ROOT) for p in (ROOT / "cuda").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert files
    assert [p for p in files if p.suffix not in {".cu", ".cuh"}] == []


def test_every_folder_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    installed = config["options"]["packages"].split()
    core = [".".join(p.parent.relative_to(ROOT).parts) for p in python_files(PACKAGE) if p.name == "__init__.py"]
    adapters = [".".join(p.parent.relative_to(ROOT).parts) for p in python_files(ADAPTERS) if p.name == "__init__.py"]
    assert sorted(installed) == sorted([*core, *(f"iou_refiner.{name}" for name in adapters), "iou_refiner.cuda"])


# --- sizes -----------------------------------------------------------------------------------------------------------


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function of a file, its docstring not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = first.end_lineno - first.lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def test_few_modules_stand_at_the_root():
    assert len([path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]) <= MOST_MODULES_AT_THE_ROOT


@pytest.mark.parametrize("path", python_files(PACKAGE, ADAPTERS, ROOT / "scripts"), ids=named)
def test_files_and_functions_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    assert {name: lines for name, lines in functions(path) if lines > LONGEST_FUNCTION} == {}


# --- what stays light ------------------------------------------------------------------------------------------------


def loaded_by(code: str, suspects: set[str]) -> set[str]:
    """Which of the suspects are loaded once some code has run, in a process of its own."""
    check = f"{code}\nimport sys\nprint('LOADED', *sorted({suspects!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    marker, *loaded = done.stdout.splitlines()[-1].split()
    assert marker == "LOADED"
    return set(loaded)


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import iou_refiner", HEAVY),
        ("import iou_refiner.cli", HEAVY),
        ("from iou_refiner.cli import app; app.meta(['--help'], result_action='return_value')", HEAVY),
        ("import iou_refiner.validation.validate", HEAVY),
        ("import iou_refiner.stage.settings, iou_refiner.training.settings, iou_refiner.head.config", HEAVY),
        ("import iou_refiner.evaluation.bootstrap, iou_refiner.evaluation.true_iou", HEAVY - {"pycocotools"}),
        ("import iou_refiner.reporting", HEAVY - {"pycocotools"}),
        ("from iou_refiner import evaluate, report, to_numpy, to_supervision", HEAVY - {"pycocotools"}),
        ("from iou_refiner import *", OPTIONAL),
    ],
)
def test_imports_stay_light(code: str, forbidden: set[str]):
    assert loaded_by(code, forbidden) == set()


def test_the_light_import_check_can_fail():
    assert loaded_by("import torch", HEAVY) == {"torch"}


def test_wrapping_a_live_detector_imports_no_coco_parser():
    code = """
import torch
from iou_refiner import HeadConfig, IoUHead, IoURefiner
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2).eval()
features, _, _ = TorchvisionAdapter(detector).extract([torch.rand(3, 64, 64)])
head = IoUHead(features.channels, features.strides, HeadConfig(width=2, hidden=(4,), output_size=2))
assert "ious" in IoURefiner(detector, head)([torch.rand(3, 64, 64)])[0]
"""
    assert loaded_by(code, {"iou_refiner.coco", "iou_refiner.coco.read", "pycocotools"}) == set()


def test_every_public_name_resolves():
    import iou_refiner

    for name in iou_refiner.__all__:
        assert getattr(iou_refiner, name) is not None
    assert set(iou_refiner.__all__) <= set(dir(iou_refiner))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = iou_refiner.nonsense
