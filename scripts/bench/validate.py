"""Seconds and peak memory of ``validate`` on a large results file.

    python -m scripts.bench.validate [records]

Expected for 1,000,000 records (about 100 MB): under 10 s and under 300 MB, imports included. About 15 s in all.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from iou_refiner.coco import Results, write_results

PER_IMAGE = 100
SIZE = (640, 480)


def make_files(folder: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """A results file as detectors write it and the ground truth it belongs to."""
    rng = np.random.default_rng(seed)
    images = np.arange(count) // PER_IMAGE + 1
    corner = rng.uniform(0, 0.7, (count, 2)) * SIZE
    size = rng.uniform(0.02, 0.3, (count, 2)) * SIZE
    boxes = np.concatenate([corner, size], 1)
    results = Results(images, rng.integers(1, 81, count), boxes, rng.uniform(0.001, 1, count))
    detections, truth = folder / "detections.json", folder / "truth.json"
    write_results(detections, results)
    listed = [
        {"id": image, "file_name": f"{image}.jpg", "width": SIZE[0], "height": SIZE[1]}
        for image in np.unique(images).tolist()
    ]
    categories = [{"id": number, "name": str(number)} for number in range(1, 81)]
    truth.write_text(json.dumps({"images": listed, "annotations": [], "categories": categories}))
    return detections, truth


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        detections, truth = make_files(Path(folder), count)
        code = (
            "import sys; from iou_refiner.validation.validate import format_report, validate; "
            "print(format_report(validate(*sys.argv[1:])))"
        )
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(detections), str(truth)], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(
            f"{count:,} records, {detections.stat().st_size / 1e6:.0f} MB: "
            f"{seconds:.1f} s, peak {peak / 1e6:.0f} MB of the whole process"
        )


if __name__ == "__main__":
    main()
