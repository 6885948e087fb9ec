"""What is wrong with a results file, all of it at once: faults of format, of meaning, and signs of earlier treatment.

Evaluators score many wrong files without a word (unknown ids, swapped box formats, duplicates), so each fault has a
code here: E is an error that makes the file unusable or its score wrong, W something the user should know. Imports
no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.data import GroundTruthFile
from iou_refiner.coco.read import Chunk, iter_results, join_chunks, read_ground_truth_file, to_ground_truth
from iou_refiner.coco.stream import CURES, FormatError, Problem
from iou_refiner.validation.findings import Example, Finding, Report, Subject
from iou_refiner.validation.findings import format_report as format_report
from iou_refiner.validation.nms_trace import check_cut, check_nms
from iou_refiner.validation.results_checks import COLUMN_CHECKS


def validate(results_path: str | Path, ground_truth_path: str | Path | None = None, *, max_examples: int = 5) -> Report:
    """Look through a results file and, where given, hold it against its ground truth.

    Unreadable records are reported and left out of what follows, so that one fault does not hide another.

    Args:
        results_path: a .json or .json.gz file.
        ground_truth_path: likewise; without it, ids and image sizes are not checked.
        max_examples: places named per finding.
    """
    problems = _Problems(max_examples)
    chunks, keys = _read(Path(results_path), problems)
    whole = join_chunks(chunks, problems.add)
    chunks.clear()
    findings = problems.findings()
    truth = None
    if ground_truth_path is not None:
        truth, more = _read_truth(Path(ground_truth_path), max_examples)
        findings += more
    subject = Subject(whole.results, whole.numbers, keys, truth, max_examples)
    for check in (*COLUMN_CHECKS, check_cut, check_nms):
        findings += check(subject)
    findings = [finding for finding in findings if not _is_consequence(finding.code, {f.code for f in findings})]
    return Report(
        tuple(sorted(findings, key=lambda finding: finding.code)),
        len(whole.results),
        len(np.unique(whole.results.image_id)),
        len(np.unique(whole.results.category_id)),
    )


# A symptom that its cause explains is not worth a line of its own.
_CAUSES = {
    "E503": {"E501"},
    "W206": {"E501", "E503"},
    "W212": {"E101", "E102", "E301"},
    "W213": {"E502"},
    "W220": {"E501"},
    "W221": {"E303"},
}


def _is_consequence(code: str, codes: set[str]) -> bool:
    return bool(_CAUSES.get(code, set()) & codes)


_KINDS = {
    "E102": "not whole JSON",
    "E103": "NaN or Infinity literals",
    "E201": "missing keys",
    "E202": "wrong types",
    "E203": "bbox is not four numbers",
    "E204": "numbers that are not finite",
}


class _Problems:
    """Counts the faults of records by code and keeps the first few of each."""

    def __init__(self, max_examples: int) -> None:
        self._max_examples = max_examples
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[Example]] = {}
        self._whole: list[Finding] = []

    def add(self, problem: Problem) -> None:
        self._counts[problem.code] += 1
        examples = self._examples.setdefault(problem.code, [])
        if len(examples) < self._max_examples:
            examples.append(Example(problem.number, problem.image_id, problem.text))

    def add_file_error(self, error: FormatError) -> None:
        self._whole.append(Finding(error.code, "error", 1, str(error)))

    def findings(self) -> list[Finding]:
        faults = [
            Finding(code, "error", count, f"{_KINDS[code]}. {CURES[code]}", tuple(self._examples[code]))
            for code, count in self._counts.items()
        ]
        return self._whole + faults


def _read(path: Path, problems: _Problems) -> tuple[list[Chunk], Counter[str]]:
    """The readable records, and how many records have which keys beyond COCO's; the extra values are not kept."""
    chunks: list[Chunk] = []
    keys: Counter[str] = Counter()
    try:
        for chunk in iter_results(path, problems.add):
            for extra in chunk.results.extra or ():
                keys.update(extra.keys())
            results = chunk.results
            lean = Results(results.image_id, results.category_id, results.bbox, results.score, results.iou)
            chunks.append(Chunk(lean, chunk.numbers))
    except FormatError as error:
        problems.add_file_error(error)
    return chunks, keys


def _read_truth(path: Path, max_examples: int) -> tuple[GroundTruth | None, list[Finding]]:
    try:
        file = read_ground_truth_file(path)
    except FormatError as error:
        return None, [Finding(error.code, "error", 1, str(error))]
    findings = list(_check_annotations(file, path, max_examples))
    try:
        return to_ground_truth(file, path), findings
    except FormatError as error:
        return None, [*findings, Finding(error.code, "error", 1, str(error))]


def _check_annotations(file: GroundTruthFile, path: Path, max_examples: int) -> Iterator[Finding]:
    uses = Counter(annotation.id for annotation in file.annotations)
    for code, level, wrong, message in (
        (
            "E401",
            "error",
            [row for row in file.annotations if row.id == 0 or uses[row.id] > 1],
            "annotation ids are 0 or occur twice, which makes pycocotools lose matches. Number them anew from 1.",
        ),
        (
            "E402",
            "error",
            [row for row in file.annotations if row.area is None or row.iscrowd is None],
            "annotations lack area or iscrowd, which stops pycocotools. Add iscrowd 0 and the bbox's area.",
        ),
        (
            "W240",
            "warning",
            [row for row in file.annotations if row.ignore and not row.iscrowd],
            "annotations have ignore without iscrowd, and evaluators go by iscrowd alone. Set iscrowd to 1.",
        ),
    ):
        if wrong:
            examples = tuple(Example(None, row.image_id, f"annotation {row.id}") for row in wrong[:max_examples])
            yield Finding(code, "error" if level == "error" else "warning", len(wrong), f"{path}: {message}", examples)
