"""What is wrong with a results file, all of it at once: faults of format, of meaning, and signs of earlier treatment.

Evaluators score many wrong files without a word (unknown ids, swapped box formats, duplicates), so each fault has a
code here: E is an error that makes the file unusable or its score wrong, W something the user should know. Imports
no torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.ground_truth import read_annotation_or_images, to_ground_truth
from iou_refiner.coco.opening import CURES, FormatError, Problem
from iou_refiner.coco.read import Chunk, iter_results, join_chunks
from iou_refiner.validation.annotation_checks import IMAGE_CHECKS, OBJECT_CHECKS, Annotated, check_as_written
from iou_refiner.validation.findings import Example, Finding, Report, Subject, finding_lines
from iou_refiner.validation.findings import format_report as format_report
from iou_refiner.validation.nms_trace import check_cut, check_nms
from iou_refiner.validation.results_checks import COLUMN_CHECKS


def validate(
    results_path: str | Path | None, ground_truth_path: str | Path | None = None, *, max_examples: int = 5
) -> Report:
    """Look through a results file and, where given, its annotation, and hold one against the other.

    Unreadable records are reported and left out of what follows, so that one fault does not hide another.

    Args:
        results_path: a .json or .json.gz file; None looks at the annotation alone.
        ground_truth_path: likewise; without it, ids and image sizes are not checked.
        max_examples: places named per finding.

    Raises:
        ValueError: no path is given.
    """
    if results_path is None:
        if ground_truth_path is None:
            raise ValueError("Give the results, `--ann` with their annotation, or both: there is nothing to look at.")
        truth, findings = _read_truth(Path(ground_truth_path), max_examples)
        listed = (0, 0, 0) if truth is None else (len(truth.images), len(truth.categories), len(truth))
        return Report(_causes_of(findings), 0, *listed)
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
    return Report(
        _causes_of(findings),
        len(whole.results),
        len(np.unique(whole.results.image_id)),
        len(np.unique(whole.results.category_id)),
    )


# A symptom that its cause explains is not worth a line of its own.
_CAUSES = {
    "E404": {"E405"},
    "E503": {"E501"},
    "E504": {"E501", "E502", "E503", "E405", "E406"},
    "E505": {"E501", "E502", "E405", "E406"},
    "W206": {"E410", "E501", "E503", "E504", "E505"},
    "W212": {"E101", "E102", "E301"},
    "W213": {"E502"},
    "W220": {"E501"},
    "W221": {"E303"},
    "W404": {"E405"},
    "W408": {"E405", "E406"},
}


def _causes_of(findings: list[Finding]) -> tuple[Finding, ...]:
    """The findings by code, without those that another one explains."""
    codes = {finding.code for finding in findings}
    causes = [finding for finding in findings if not _CAUSES.get(finding.code, set()) & codes]
    return tuple(sorted(causes, key=lambda finding: finding.code))


_KINDS = {
    "E102": "not whole JSON",
    "E104": "the same key twice",
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
        file, has_annotations = read_annotation_or_images(path)
        truth = to_ground_truth(file, path, any_crowd=True)
    except FormatError as error:
        return None, [Finding(error.code, "error", 1, str(error))]
    annotated = Annotated(truth, path, max_examples)
    if not has_annotations:
        message = (
            f"{path}: has no annotations, as COCO's image_info_*.json. dump and rescore take such a list of images; "
            "eval and train refuse it. Name the annotation for those."
        )
        findings = [finding for check in IMAGE_CHECKS for finding in check(annotated)]
        return truth, [*findings, Finding("W412", "warning", 1, message)]
    findings = [finding for check in (*IMAGE_CHECKS, *OBJECT_CHECKS) for finding in check(annotated)]
    return truth, [*findings, *check_as_written(file, annotated)]


def check_before(
    results: Results, ground_truth: GroundTruth, path: str | Path, *, ann: str | Path | None = None
) -> None:
    """Refuse what :func:`validate` calls an error, before work is spent on it; warnings pass.

    Args:
        results: all records of a file in its order, as :func:`iou_refiner.coco.read_results` gives them.
        ground_truth: its images and categories; from :func:`iou_refiner.coco.read_images` where annotations do not
            matter.
        path: of the results, for the message.
        ann: path of the annotation where its objects matter (eval): its errors are refused too. None checks none of
            them, only the images.

    Raises:
        DataError: one line per kind of error with its first records, its cause and its cure, and how to skip the check
            (``--no-check``).
    """
    subject = Subject(results, np.arange(1, len(results) + 1), Counter(), ground_truth, 3)
    annotated = Annotated(ground_truth, "the annotation" if ann is None else ann, 3)
    object_checks = () if ann is None else OBJECT_CHECKS
    findings = [
        *(finding for check in COLUMN_CHECKS for finding in check(subject)),
        *(finding for check in (*IMAGE_CHECKS, *object_checks) for finding in check(annotated)),
    ]
    errors = [finding for finding in _causes_of(findings) if finding.level == "error"]
    if errors:
        lines = "\n".join(line for finding in errors for line in finding_lines(finding))
        raise DataError(f"{path} does not pass `iou-refiner validate`:\n{lines}\nTo go on all the same: --no-check")
