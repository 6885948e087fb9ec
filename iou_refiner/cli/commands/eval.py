"""``iou-refiner eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.exit_codes import GATE_MISSED, OK
from iou_refiner.cli.inputs import CategoryIds, ImageIds, category_numbers
from iou_refiner.cli.options import Annotation, NoCheck, Quiet

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
    image_ids: ImageIds = "annotation",
    category_ids: CategoryIds = "annotation",
    check: NoCheck = True,
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
    from iou_refiner.evaluation.bootstrap import Comparison
    from iou_refiner.verbs.evaluate import evaluate

    outcome = evaluate(
        detections, ann, baseline=baseline, bootstrap=bootstrap, max_dets=max_dets, seed=console.seed, check=check,
        image_ids=image_ids, category_ids=category_numbers(category_ids),
    )  # fmt: skip
    console.table(outcome.columns, outcome.rows(), outcome.to_dict())
    measured: Mapping[str, float]
    if isinstance(outcome, Comparison):
        measured = {**outcome.after.metrics, **{f"+{k}": v for k, v in outcome.differences.items()}}
        console.note(
            f"Where it changed, with pictures: iou-refiner report {baseline} {detections} --ann {ann} -o report.html"
        )
    else:
        measured = outcome.metrics
    missed = [line for name, bar in gates if (line := _missed(name, measured[name], bar))]
    for line in missed:
        console.note(f"Gate missed: {line}.")
    return GATE_MISSED if missed else OK


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
