"""``iou-refiner eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.exit_codes import GATE_MISSED, OK
from iou_refiner.cli.options import Annotation, Quiet

if TYPE_CHECKING:
    from iou_refiner.coco import GroundTruth, Results

_MOST_RESAMPLES = 100_000  # as in evaluation.bootstrap, which --help does not wait for


def eval_(
    detections: Path,
    *,
    ann: Annotation,
    baseline: Annotated[
        Path | None, Parameter(help="COCO results before; adds the difference and its interval.")
    ] = None,
    bootstrap: Annotated[int, Parameter(validator=Number(gte=0, lte=_MOST_RESAMPLES))] = 1000,
    max_dets: Annotated[int, Parameter(validator=Number(gte=1, lte=1_000_000))] = 100,
    fail_under: Annotated[tuple[str, ...], Parameter(help="A gate such as AP=0.38, or with --baseline +AP=0.")] = (),
    check: Annotated[
        bool,
        Parameter(
            negative="--no-check",
            show_default=False,
            help="Refuse files with errors, as `validate` finds them; default.",
        ),
    ] = True,
    console: Quiet,
) -> int:
    """COCO AP of a results file, at each threshold; with --baseline before, after, difference and 95 % interval.

    Parameters
    ----------
    detections
        COCO results, .json or .json.gz.
    bootstrap
        Resamples of the images for the interval, at most 100,000.
    max_dets
        Detections that count per image and category, as in pycocotools.
    """
    with console.usage():
        gates = [_gate(text, baseline is not None) for text in fail_under]
    ground_truth, sides = _read(ann, [path for path in (baseline, detections) if path is not None], check)
    measured: Mapping[str, float]
    if baseline is None:
        from iou_refiner.evaluation.ap import evaluate

        evaluation = evaluate(sides[0], ground_truth, max_dets=max_dets)
        console.table(["", "AP points"], evaluation.rows(), evaluation.to_dict())
        measured = evaluation.metrics
    else:
        from iou_refiner.evaluation.bootstrap import compare

        comparison = compare(
            sides[0], sides[1], ground_truth, resamples=bootstrap, seed=console.seed, max_dets=max_dets
        )
        console.table(["", "before", "after", "difference", "95 % interval"], comparison.rows(), comparison.to_dict())
        measured = {**comparison.after.metrics, **{f"+{k}": v for k, v in comparison.differences.items()}}
        console.note(
            f"Where it changed, with pictures: iou-refiner report {baseline} {detections} --ann {ann} -o report.html"
        )
    missed = [line for name, bar in gates if (line := _missed(name, measured[name], bar))]
    for line in missed:
        console.note(f"Gate missed: {line}.")
    return GATE_MISSED if missed else OK


def _read(ann: Path, files: list[Path], check: bool) -> tuple[GroundTruth, list[Results]]:
    """The annotation and the results, refused if `validate` would."""
    from iou_refiner.coco import read_ground_truth, read_results
    from iou_refiner.validation.validate import check_before

    ground_truth = read_ground_truth(ann)
    sides = [read_results(path) for path in files]
    if check:
        for path, results in zip(files, sides, strict=True):
            check_before(results, ground_truth, path, ann=ann)
    return ground_truth, sides


def _gate(text: str, has_baseline: bool) -> tuple[str, float]:
    """Name and bar of a gate, checked before anything is measured."""
    from iou_refiner.evaluation.ap import METRICS

    name, _, bar = text.partition("=")
    if name.startswith("+") and not has_baseline:
        raise ValueError(f"--fail-under {text}: a difference needs --baseline.")
    known = [*METRICS, *(f"+{metric}" for metric in METRICS if has_baseline)]
    if name not in known:
        raise ValueError(f"--fail-under {text}: no such metric; there are {', '.join(known)}.")
    try:
        return name, float(bar)
    except ValueError:
        raise ValueError(f"--fail-under {text!r} is not of the form NAME=NUMBER, for example AP=0.38.") from None


def _missed(name: str, value: float, bar: float) -> str | None:
    """Why a gate is missed, or None: only a value that is there and reaches the bar passes."""
    if value >= bar:
        return None
    if value != value:  # NaN
        return f"{name} cannot be measured, for the annotation has no such object"
    return (
        f"{name} is {value:.4f} and cannot be measured against {bar}"
        if bar != bar
        else (f"{name} is {value:.4f}, below {bar}")
    )
