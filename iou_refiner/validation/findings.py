"""What validation says: findings under stable codes, the report they make, and the subject they are made on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.data import IntArray

ENOUGH = 20  # records below which a statistic of the file (all integers, all above a score) says nothing


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
    """What :func:`validate` says, by code.

    Args:
        findings: by code.
        records: readable ones of the results.
        images: that records are of; those listed, where an annotation was looked at alone.
        categories: likewise.
        annotations: of an annotation that was looked at alone, else None.
    """

    findings: tuple[Finding, ...]
    records: int
    images: int
    categories: int
    annotations: int | None = None

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
    what = f"{report.records:,} records" if report.annotations is None else f"{report.annotations:,} annotations"
    lines = [
        f"{what}, {report.images:,} images, {report.categories:,} categories: "
        f"{errors} kinds of error, {warnings} of warning"
    ]
    return "\n".join([*lines, *(line for finding in report.findings for line in finding_lines(finding))])


def finding_lines(finding: Finding) -> list[str]:
    """A finding as lines of text: what it is and the cure, then its examples indented."""
    lines = [f"{finding.code} {finding.level} x{finding.count:,}: {finding.message}"]
    for example in finding.examples:
        record = "" if example.record is None else f"record {example.record:,}"
        image = "" if example.image_id is None else f"image {example.image_id}"
        place = ", ".join(filter(None, (record, image)))
        lines.append(f"    {place + ': ' if place else ''}{example.text}")
    if 0 < len(finding.examples) < finding.count:
        lines.append(f"    ... and {finding.count - len(finding.examples):,} more")
    return lines


@dataclass(frozen=True, eq=False)
class Subject:
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
        return [Finding(code, level_of(code), len(rows), message, examples)]


def level_of(code: str) -> Literal["error", "warning"]:
    """What the first letter of a code says."""
    return "error" if code.startswith("E") else "warning"


def about_file(code: Literal["W212", "W213", "W214", "W220", "W221"], message: str) -> Finding:
    """A warning about the file as a whole."""
    return Finding(code, "warning", 1, message)
