#!/usr/bin/env bash
# All that CI checks, in order of how fast it fails: style, types, tests, the wheel away from the checkout.
# Needs the `dev` extra; --quick leaves out the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
mypy
[ "${1:-}" = --quick ] || python -m pytest -q

# The wheel must hold the kernels and the adapters, and work where no checkout is in sight.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python -m build --quiet --outdir "$scratch/dist" .
# First on the path, it hides the editable install of this checkout.
python -m pip install --quiet --no-deps --target "$scratch/site" "$scratch"/dist/*.whl
cd "$scratch"
PYTHONPATH="$scratch/site" python - <<'PY'
import iou_refiner, iou_refiner.adapters.torchvision, iou_refiner.adapters.onnx, torch
from iou_refiner.pooling import cuda_kernels
from pathlib import Path
home = Path(iou_refiner.__file__).parent
assert home.parent.name == "site", home
assert "prroi_forward" in cuda_kernels.source()
assert sorted(p.name for p in (home / "cuda").iterdir()) == ["prroi_pool.cu"]
maps = iou_refiner.FeatureMaps((torch.ones(1, 2, 8, 8),), (1.0,), ((8, 8),))
assert torch.allclose(iou_refiner.prroi_pool(maps, torch.tensor([[2.0, 2, 6, 6]])), torch.ones(()))
print("wheel:", iou_refiner.__version__, "works away from the checkout")
PY
