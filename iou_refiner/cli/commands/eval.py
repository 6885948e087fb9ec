"""``iou-refiner eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.exit_codes import GATE_MISSED, OK
from iou_refiner.cli.options import Annotation, Quiet


def eval_(
    detections: Path,
    *,
    ann: Annotation,
    baseline: Annotated[
        Path | None, Parameter(help="COCO results before; adds the difference and its interval.")
    ] = None,
    bootstrap: Annotated[int, Parameter(validator=Number(gte=0))] = 1000,
    max_dets: Annotated[int, Parameter(validator=Number(gte=1))] = 100,
    fail_under: Annotated[tuple[str, ...], Parameter(help="A gate such as AP=0.38, or with --baseline +AP=0.")] = (),
    console: Quiet,
) -> int:
    """COCO AP of a results file, at each threshold; with --baseline before, after, difference and 95 % interval.

    Parameters
    ----------
    detections
        COCO results, .json or .json.gz.
    bootstrap
        Resamples of the images for the interval.
    max_dets
        Detections that count per image and category, as in pycocotools.
    """
    from iou_refiner.coco import read_ground_truth, read_results

    with console.usage():
        gates = [_gate(text, baseline is not None) for text in fail_under]
    results, ground_truth = read_results(detections), read_ground_truth(ann)
    if baseline is None:
        from iou_refiner.evaluation.ap import evaluate

        evaluation = evaluate(results, ground_truth, max_dets=max_dets)
        console.table(["", "AP points"], evaluation.rows(), evaluation.to_dict())
        measured = evaluation.metrics
    else:
        from iou_refiner.evaluation.bootstrap import compare

        comparison = compare(
            read_results(baseline), results, ground_truth,
            resamples=bootstrap, seed=console.seed, max_dets=max_dets,
        )  # fmt: skip
        console.table(["", "before", "after", "difference", "95 % interval"], comparison.rows(), comparison.to_dict())
        measured = {**comparison.after.metrics, **{f"+{k}": v for k, v in comparison.differences.items()}}
    with console.usage():
        values = [(name, _of(measured, name), bar) for name, bar in gates]
    missed = [f"{name} is {value:.4f}, below {bar}" for name, value, bar in values if value < bar]
    for line in missed:
        console.note(f"Gate missed: {line}.")
    return GATE_MISSED if missed else OK


def _gate(text: str, has_baseline: bool) -> tuple[str, float]:
    name, _, bar = text.partition("=")
    if name.startswith("+") and not has_baseline:
        raise ValueError(f"--fail-under {text}: a difference needs --baseline.")
    try:
        return name, float(bar)
    except ValueError:
        raise ValueError(f"--fail-under {text!r} is not of the form NAME=NUMBER, for example AP=0.38.") from None


def _of(measured: Mapping[str, float], name: str) -> float:
    if name not in measured:
        raise ValueError(f"--fail-under {name}: no such metric; there are {', '.join(measured)}.")
    return measured[name]
