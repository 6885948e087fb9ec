"""Where things lie."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Real images and models, beside the checkout or where IOU_REFINER_SHARED says.
SHARED = Path(os.environ.get("IOU_REFINER_SHARED", ROOT.parent / "shared"))
