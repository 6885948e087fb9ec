"""What is wrong with a results file, all of it at once: faults of format, of meaning, and signs of earlier treatment.

Evaluators score many wrong files without a word (unknown ids, swapped box formats, duplicates), so each fault has a
code here: E is an error that makes the file unusable or its score wrong, W something the user should know. Imports
no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from iou_refiner.coco import (
    CURES,
    Chunk,
    FloatArray,
    FormatError,
    GroundTruth,
    GroundTruthFile,
    IntArray,
    Problem,
    Results,
    group_rows,
    iter_results,
    join_chunks,
    read_ground_truth_file,
    to_ground_truth,
    xywh_to_xyxy,
)

_ENOUGH = 20  # records below which a statistic of the file (all integers, all above a score) says nothing
_PER_IMAGE = 100  # what COCO's server and evaluators keep of an image
_EDGE = 1.0  # pixels that rounding may put a box beyond its image
_PAIRS = 4_000_000  # looked at for traces of NMS
_PER_GROUP = 200  # best boxes of one class in one image, compared with one another for traces of NMS


@dataclass(frozen=True)
class Example:
    """One place where a finding was made; ``record`` counts from 1 and is None for what is not a record."""

    record: int | None
    image_id: int | None
    text: str


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Args:
        code: as ``E301``; stable.
        level: an error makes the file unusable or its score wrong.
        count: how often it was found; 1 for a statement about the whole file.
        message: one sentence and the cure.
        examples: the first few places.
    """

    code: str
    level: Literal["error", "warning"]
    count: int
    message: str
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Report:
    """What :func:`validate` found, by code; ``records`` counts the readable ones, images and categories those used."""

    findings: tuple[Finding, ...]
    records: int
    images: int
    categories: int

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as what json can write."""
        return {"ok": self.ok, **asdict(self)}


def format_report(report: Report) -> str:
    """The report as plain text: a summary line, one line per finding, its examples indented below."""
    errors = sum(finding.level == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    lines = [
        f"{report.records:,} records, {report.images:,} images, {report.categories:,} categories: "
        f"{errors} kinds of error, {warnings} of warning"
    ]
    for finding in report.findings:
        lines.append(f"{finding.code} {finding.level} x{finding.count:,}: {finding.message}")
        for example in finding.examples:
            record = "" if example.record is None else f"record {example.record:,}"
            image = "" if example.image_id is None else f"image {example.image_id}"
            place = ", ".join(filter(None, (record, image)))
            lines.append(f"    {place + ': ' if place else ''}{example.text}")
        if 0 < len(finding.examples) < finding.count:
            lines.append(f"    ... and {finding.count - len(finding.examples):,} more")
    return "\n".join(lines)


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
    found = _Input(whole.results, whole.numbers, keys, truth, max_examples)
    for check in _CHECKS:
        findings += check(found)
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


# Reading --------------------------------------------------------------------------------------------------------------

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


# Checks of columns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Input:
    """What the checks look at: readable records with their numbers from 1, counts of other keys, the ground truth."""

    results: Results
    numbers: IntArray
    keys: Counter[str]
    truth: GroundTruth | None
    max_examples: int

    def finding(
        self, code: str, rows: IntArray, message: str, describe: Callable[[int], str] | None = None
    ) -> list[Finding]:
        """The finding of ``code`` at ``rows``, or none if there are none; ``describe`` says what is in a row."""
        if not len(rows):
            return []
        describe = describe or (lambda row: f"bbox {self.results.bbox[row].tolist()}")
        examples = tuple(
            Example(int(self.numbers[row]), int(self.results.image_id[row]), describe(row))
            for row in rows[: self.max_examples].tolist()
        )
        return [Finding(code, "error" if code.startswith("E") else "warning", len(rows), message, examples)]

    def image_sizes(self) -> FloatArray:
        """(n, 2) width and height of each record's image; NaN where the image is unknown."""
        sizes = np.full((len(self.results), 2), np.nan)
        if self.truth is not None and self.truth.images:
            ids = np.array([image.id for image in self.truth.images], np.int64)
            table = np.array([(image.width, image.height) for image in self.truth.images], np.float64)
            order = np.argsort(ids)
            place = order[np.searchsorted(ids, self.results.image_id, sorter=order).clip(max=len(ids) - 1)]
            known = ids[place] == self.results.image_id
            sizes[known] = table[place[known]]
        return sizes


def _about_file(code: Literal["W212", "W213", "W214", "W220", "W221"], message: str) -> Finding:
    return Finding(code, "warning", 1, message)


def _check_sizes(found: _Input) -> list[Finding]:
    size = found.results.bbox[:, 2:]
    negative = (size < 0).any(1)
    empty = (size == 0).any(1) & ~negative
    return [
        *found.finding("E205", np.flatnonzero(negative), "negative width or height. bbox is [x, y, width, height]."),
        *found.finding("W205", np.flatnonzero(empty), "zero width or height: such a box can match nothing. Drop it."),
    ]


def _first(ids: NDArray[Any]) -> str:
    return ", ".join(map(str, ids[:5].tolist())) + (", ..." if len(ids) > 5 else "")


def _check_image_ids(found: _Input) -> list[Finding]:
    if found.truth is None:
        return []
    known = np.array([image.id for image in found.truth.images], np.int64)
    rows = np.flatnonzero(~np.isin(found.results.image_id, known))
    unknown = np.unique(found.results.image_id[rows])
    message = f"image ids that the ground truth does not have ({_first(unknown)}). {_guess_image_ids(found, unknown)}"
    return found.finding("E301", rows, message, lambda row: f"image_id {found.results.image_id[row]}")


def _guess_image_ids(found: _Input, unknown: IntArray) -> str:
    images = found.truth.images if found.truth else ()
    stems = [re.search(r"(\d+)\.\w+$", image.file_name) for image in images]
    numbers = np.array([int(stem[1]) for stem in stems if stem and len(stem[1]) < 19], np.int64)
    if len(unknown) and np.isin(unknown, numbers).all():
        return "They look like file name stems: look up the id of the image with that file name."
    if len(unknown) and found.results.image_id.min() >= 0 and found.results.image_id.max() <= len(images):
        return "They look like positions in the image list: write the id of the image at that position."
    return "Is this the ground truth of the same split?"


def _check_category_ids(found: _Input) -> list[Finding]:
    if found.truth is None:
        return []
    known = np.array(sorted(category.id for category in found.truth.categories), np.int64)
    rows = np.flatnonzero(~np.isin(found.results.category_id, known))
    unknown = np.unique(found.results.category_id[rows])
    message = f"category ids that the ground truth does not have ({_first(unknown)}). {_guess_categories(found, known)}"
    return found.finding("E302", rows, message, lambda row: f"category_id {found.results.category_id[row]}")


def _guess_categories(found: _Input, known: IntArray) -> str:
    if not len(known) or not len(found.results):
        return "The ground truth lists no categories." if not len(known) else ""
    low, high = int(found.results.category_id.min()), int(found.results.category_id.max())
    span = f"yours are {low}..{high}, its {len(known)} are {known[0]}..{known[-1]}"
    gaps = known[-1] - known[0] + 1 != len(known)
    if low == 0 and high < len(known) and known[0] == 1 and not gaps:
        return f"They look off by one ({span}): add 1."
    if low >= 0 and high < len(known) + min(low, 1):
        return f"They look like contiguous labels ({span}{' with gaps' if gaps else ''}): write the category's own id."
    return f"Is this the ground truth of the same classes ({span})?"


def _check_scores(found: _Input) -> list[Finding]:
    findings = _check_unit_range(found, "score", found.results.score)
    if found.results.iou is not None:
        findings += _check_unit_range(found, "iou", found.results.iou)
    return findings


def _check_unit_range(found: _Input, name: str, values: FloatArray) -> list[Finding]:
    rows = np.flatnonzero((values < 0) | (values > 1))
    if (values < 0).any():
        guess = "They look like logits: apply the sigmoid or softmax."
    elif (values <= 100).all():
        guess = "They look like percent: divide by 100."
    else:
        guess = "Bring them to [0, 1]."
    return found.finding("E303", rows, f"{name} outside [0, 1]. {guess}", lambda row: f"{name} {values[row]:g}")


def _check_box_format(found: _Input) -> list[Finding]:
    boxes = found.results.bbox
    if len(boxes) < _ENOUGH:
        return []
    if boxes.max() <= 1.5:
        message = "boxes look normalised: no coordinate is above 1.5. Multiply by the image's width and height."
        return found.finding("E502", np.arange(len(boxes)), message)
    findings = []
    if _look_xyxy(boxes, found.image_sizes()):
        message = "boxes look like [x1, y1, x2, y2]. Write [x, y, width, height]: subtract the first two numbers."
        findings += found.finding("E501", np.arange(len(boxes)), message)
    return findings


def _look_xyxy(boxes: FloatArray, sizes: FloatArray) -> bool:
    """Whether boxes make sense as corners and not as corner and size.

    As corners, the second pair always exceeds the first. So it does for boxes that start near the origin, read as
    sizes; but those cannot also begin in the far half of what the file's boxes reach.
    """
    ordered = (boxes[:, 2:] > boxes[:, :2]).all(1).mean() >= 0.99
    far = (boxes[:, :2] > boxes[:, 2:].max(0) / 2).any(1).mean() >= 0.05
    known = ~np.isnan(sizes).any(1)
    if not (ordered and far) or not known.any():
        return bool(ordered and far)
    inside = (boxes[known, 2:] <= sizes[known] + _EDGE).all(1).mean() >= 0.99
    beyond = (boxes[known, :2] + boxes[known, 2:] > sizes[known] + _EDGE).any(1).mean() >= 0.1
    return bool(inside and beyond)


def _check_frame(found: _Input) -> list[Finding]:
    sizes = found.image_sizes()
    corners = xywh_to_xyxy(found.results.bbox)
    outside = (corners[:, :2] < -_EDGE).any(1) | (corners[:, 2:] > sizes + _EDGE).any(1)
    rows = np.flatnonzero(outside)
    if not len(rows):
        return []
    message = f"boxes reach more than {_EDGE:g} pixel beyond their image. Clip them if the detector did not mean to."
    findings = found.finding("W206", rows, message)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = (corners[:, 2:] / sizes).max(1)  # NaN where the image is unknown
    known = np.flatnonzero(np.isfinite(reach))
    groups = group_rows(found.results.image_id[known])
    factors = np.array([reach[known[group]].max() for group in groups.values()])
    if len(known) >= _ENOUGH and (factors > 1.05).mean() >= 0.5 and outside.mean() >= 0.1:
        low, middle, high = np.quantile(factors, [0.25, 0.5, 0.75])
        text = f"boxes reach beyond their images by a factor of about {middle:.2f} (quartiles {low:.2f}, {high:.2f})"
        findings += found.finding("E503", rows, f"{text}: a resized frame? Scale them back to the original image.")
    return findings


def _check_duplicates(found: _Input) -> list[Finding]:
    results = found.results
    keys = [results.image_id, results.category_id, results.score, *results.bbox.T]
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    rows = np.sort(order[1:][same])  # the sort is stable, so the first of equal records is not among them
    message = "exact duplicates (same image, class, box and score), each a false positive. Drop them."
    return found.finding("W210", rows, message)


def _check_images(found: _Input) -> list[Finding]:
    findings = []
    ids, counts = np.unique(found.results.image_id, return_counts=True)
    many = np.flatnonzero(counts > _PER_IMAGE)
    if len(many):
        message = (
            f"images with more than {_PER_IMAGE} records: pycocotools keeps {_PER_IMAGE} per image and category, "
            f"the COCO server {_PER_IMAGE} per image. Say which is meant when comparing."
        )
        examples = tuple(Example(None, int(ids[at]), f"{counts[at]:,} records") for at in many[: found.max_examples])
        findings.append(Finding("W211", "warning", len(many), message, examples))
    if found.truth is not None:
        seen = set(ids.tolist())
        empty = [image.id for image in found.truth.images if image.id not in seen]
        if empty:
            message = "images without detections; they count as missed. Was the whole split run?"
            examples = tuple(Example(None, image, "no record") for image in empty[: found.max_examples])
            findings.append(Finding("W212", "warning", len(empty), message, examples))
    return findings


def _check_rounding(found: _Input) -> list[Finding]:
    boxes, scores = found.results.bbox, found.results.score
    findings: list[Finding] = []
    if len(boxes) < _ENOUGH:
        return findings
    if (boxes == np.round(boxes)).all():
        message = "all boxes are whole pixels, which costs about .3 points of AP75. Save two decimals."
        findings.append(_about_file("W213", message))
    if np.abs(scores - np.round(scores, 2)).max() < 1e-9:
        message = "scores have at most two decimals, so many tie and their order is lost. Save five or six."
        findings.append(_about_file("W214", message))
    return findings


def _check_keys(found: _Input) -> list[Finding]:
    findings = []
    if count := found.keys["segmentation"]:
        message = "records with a segmentation: it no longer fits a box that moves, so refinement drops it."
        findings.append(Finding("W230", "warning", count, message))
    names = sorted(key for key in found.keys if key != "segmentation")
    if names:
        message = (
            f"records have other keys, which are kept: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}."
        )
        findings.append(Finding("W250", "warning", max(found.keys[key] for key in names), message))
    return findings


# Traces of earlier treatment ------------------------------------------------------------------------------------------


def _check_cut(found: _Input) -> list[Finding]:
    scores = found.results.score
    if len(scores) < _ENOUGH or scores.min() < 0.05:
        return []
    message = (
        f"no score is below {scores.min():.2f}: the file was cut there, and low scores are what rescoring lifts. "
        "Save detections from a score of .001 or less."
    )
    return [_about_file("W221", message)]


def _check_nms(found: _Input) -> list[Finding]:
    overlaps = _same_class_overlaps(found.results)
    if not len(overlaps):
        return []
    largest = float(overlaps.max())
    # NMS cuts a distribution off, so pairs crowd below the threshold; a crowd-free scene has a tail that thins out.
    near = int((overlaps > largest - 0.1).sum())
    if largest > 0.95 or largest < 0.2 or near < _ENOUGH:
        return []
    message = (
        f"the file looks already NMS-ed at about {largest:.2f}, the largest same-class overlap found. IoU-guided NMS "
        "has nothing to do; rescoring and refinement still act. Save the boxes before NMS to use all three."
    )
    return [_about_file("W220", message)]


def _same_class_overlaps(results: Results) -> FloatArray:
    """Non-zero IoUs of pairs of one class in one image, from a sample of bounded size.

    A pair above the threshold is in almost every group of a file that was not NMS-ed and in none of one that was, so
    a sample of groups tells; and NMS leaves no pair among the best boxes if it leaves none at all.
    """
    rows, group = _sample_groups(results)
    corners = xywh_to_xyxy(results.bbox[rows])
    area = results.bbox[rows, 2:].clip(min=0).prod(1)
    found = []
    left = np.arange(len(rows))
    for step in range(1, _PER_GROUP):
        left = left[left + step < len(rows)]
        left = left[group[left] == group[left + step]]
        if not len(left):
            break
        right = left + step
        size = np.minimum(corners[left, 2:], corners[right, 2:]) - np.maximum(corners[left, :2], corners[right, :2])
        shared = size.clip(min=0).prod(1)
        touching = shared > 0
        found.append(shared[touching] / (area[left] + area[right] - shared)[touching])
    return np.concatenate([np.empty(0), *found])


def _sample_groups(results: Results) -> tuple[IntArray, IntArray]:
    """Rows of evenly spread (image, class) groups, best first, within the budget of pairs; and each row's group."""
    order = np.lexsort((-results.score, results.category_id, results.image_id))
    image, category = results.image_id[order], results.category_id[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (image[1:] != image[:-1]) | (category[1:] != category[:-1])
    group = np.cumsum(begins) - 1
    rank = np.arange(len(order)) - np.flatnonzero(begins)[group]
    order, group = order[rank < _PER_GROUP], group[rank < _PER_GROUP]
    sizes = np.bincount(group)
    pairs = int((sizes * (sizes - 1) // 2).sum())
    stride = -(-pairs // _PAIRS) or 1
    chosen = group % stride == 0
    return order[chosen], group[chosen]


_CHECKS: tuple[Callable[[_Input], list[Finding]], ...] = (
    _check_sizes,
    _check_image_ids,
    _check_category_ids,
    _check_scores,
    _check_box_format,
    _check_frame,
    _check_duplicates,
    _check_images,
    _check_rounding,
    _check_keys,
    _check_cut,
    _check_nms,
)
