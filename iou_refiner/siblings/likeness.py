"""Whether candidates are like those that a network over siblings was trained on.

Nothing in a results file says which detector it is of. But a network that knows how the scores and the crowds of one
detector look is lost on those of another, and on what a suppression has left of its own. So a head remembers both, and
what differs too much is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import DataError

# Quantiles of the scores that are compared, and by how much their logits may differ.
_QUANTILES = (0.1, 0.5, 0.9)
_FARTHEST = 0.75
_SMALLEST_SCORE = 1e-4
# Share of the crowd in training below which a suppression must have been at work.
_THINNED = 0.35


def likeness(scores: NDArray[np.float64], crowd: float) -> dict[str, Any]:
    """What a head remembers of candidates, as plain data.

    Args:
        scores: (n,) class scores of all of them; of none nothing is remembered.
        crowd: candidates that overlap a survivor by more than IoU .7, the mean over survivors.
    """
    if not len(scores):
        return {}
    return {"score_quantiles": np.quantile(scores, _QUANTILES).round(6).tolist(), "crowd": round(crowd, 3)}


def check_likeness(trained: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """Raise DataError if candidates differ too much from those that a head was trained on.

    Args:
        trained: what the head remembers; nothing is checked where that is nothing.
        here: what the candidates at hand are like; likewise.
        what: the file, for the message.
    """
    if not trained or not here:
        return
    if here["crowd"] < _THINNED * trained["crowd"]:
        raise DataError(
            f"{what}: {here['crowd']:.2f} candidates overlap a box by more than .7 on average, in training it was "
            f"{trained['crowd']:.2f}: these look like boxes after suppression, and nothing is left to learn from "
            "their siblings. Save the candidates before suppression: iou-refiner dump. Or add --no-check."
        )
    now, then = (_logit(np.asarray(about["score_quantiles"], np.float64)) for about in (here, trained))
    if np.abs(now - then).max() > _FARTHEST:
        raise DataError(
            f"{what}: a tenth, a half and nine tenths of the scores lie below {_listed(here)}, in training below "
            f"{_listed(trained)}: these are scores of another detector, or cut at another threshold. Train a head on "
            "candidates like these, or add --no-check."
        )


def _logit(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(scores, _SMALLEST_SCORE, 1 - _SMALLEST_SCORE)
    return np.asarray(np.log(inside / (1 - inside)))


def _listed(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:.3f}" for value in about["score_quantiles"])
