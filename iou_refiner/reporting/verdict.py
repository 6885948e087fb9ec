"""The gain in one sentence, and whether to trust it, by rule."""

from __future__ import annotations

from dataclasses import dataclass

from iou_refiner.evaluation.ap import points
from iou_refiner.evaluation.bootstrap import Comparison

FEW_IMAGES = 100  # below which a resample of the images says little about others
LEVELS = ("gain", "unclear", "loss", "none")


@dataclass(frozen=True)
class Verdict:
    """What the numbers say.

    Args:
        level: one of :data:`LEVELS`: a gain to trust, not clear, a loss, or no difference at all.
        gain: the gain in AP with its interval, one sentence.
        trust: whether to trust it, one sentence.
        reasons: what that rests on, a sentence each.
    """

    level: str
    gain: str
    trust: str
    reasons: tuple[str, ...]


def verdict_of(comparison: Comparison) -> Verdict:
    """The verdict on a comparison.

    A gain is to be trusted where the whole interval of AP lies above 0, at least 100 images were measured and AP50 has
    not clearly fallen. It is a loss where the interval lies below 0.
    """
    images = comparison.after.images
    low, high = comparison.intervals["AP"]
    level, trust = _level(comparison)
    measured = low == low  # not NaN
    place = "above 0" if low > 0 else "below 0" if high < 0 else "on both sides of 0"
    interval = (
        f"The 95 % interval of the difference in AP, [{points(low, '+')}, {points(high, '+')}], lies {place}."
        if measured
        else "There is no interval: without resamples of the images, chance cannot be told from a gain."
    )
    few = f", fewer than {FEW_IMAGES}: other images may say otherwise" if images < FEW_IMAGES else ""
    number = f"{images:,} {'image was' if images == 1 else 'images were'} measured{few}."
    reasons = (interval, number, _ap50(comparison)) if level != "none" else (number,)
    return Verdict(level, _gain(comparison), trust, reasons)


def _gain(comparison: Comparison) -> str:
    """AP before and after, the difference and its interval, in points."""
    before, after = comparison.before.metrics["AP"], comparison.after.metrics["AP"]
    low, high = comparison.intervals["AP"]
    spread = f" [{points(low, '+')}, {points(high, '+')}]" if low == low else ""
    images = f"{comparison.after.images:,} image{'' if comparison.after.images == 1 else 's'}"
    return f"AP {points(before)} → {points(after)}, {points(after - before, '+')}{spread} on {images}"


def _level(comparison: Comparison) -> tuple[str, str]:
    """The level, and the sentence that goes with it."""
    difference = comparison.differences["AP"]
    low, high = comparison.intervals["AP"]
    if difference != difference:
        return "unclear", "Nothing can be said: the annotation has no object."
    if all(value == 0 or value != value for value in comparison.differences.values()):
        return "none", "No difference: every number is the same before and after."
    if high < 0:
        return "loss", "This is a loss, beyond what chance explains."
    if low > 0 and comparison.after.images < FEW_IMAGES:
        return "unclear", "Probably a gain, but measured on few images: measure on more before you rely on it."
    if low > 0 and comparison.intervals["AP50"][1] < 0:
        return "unclear", "A gain in AP with a price: boxes fit better, but fewer objects are found at IoU 0.5."
    if low > 0:
        return "gain", "A gain to trust, as far as these images are like yours."
    return "unclear", "Not clear: the difference may be chance."


def _ap50(comparison: Comparison) -> str:
    """What became of AP50, which counts objects found rather than boxes that fit."""
    difference = comparison.differences["AP50"]
    low, high = comparison.intervals["AP50"]
    change = f"{points(difference, '+')} [{points(low, '+')}, {points(high, '+')}]"
    if low != low:
        return f"AP50, where a loose box is enough, changed by {points(difference, '+')}."
    if high < 0:
        return f"AP50, where a loose box is enough, is lower, {change}."
    if low > 0:
        return f"AP50, where a loose box is enough, rose too, {change}."
    return f"AP50, where a loose box is enough, is not clearly different, {change}."
