"""One word for one meaning: the words that CONTRIBUTING.md lists as gone do not come back."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

CODE = sorted(path for folder in ("iou_refiner", "adapters", "scripts") for path in (ROOT / folder).rglob("*.py"))
PROSE = [*CODE, *sorted((ROOT / "examples").glob("*.py")), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# As names in code, with what to say instead.
GONE_NAMES = {
    "predictor": "head", "worth": "ranking", "worths": "ranking", "energy": "ranking", "way": "deltas",
    "found": "candidates, detections", "kept": "keep, detections", "given": "candidates", "crowds": "ignored",
    "asked": "samples", "frame": "transform", "frames": "transforms", "pyramid": "table", "look": "source",
    "moves": "regression_steps", "margin": "min_gain", "refine_top": "refine_topk", "judge": "predict",
    "judgements": "predictions", "question": "ablation", "questions": "ablations", "lab": "bed",
}  # fmt: skip
# Anywhere: in code, comments, docstrings and documents.
GONE_WORDS = {
    r"IoUPredictor": "IoUHead", r"FeaturePyramid(?!Network)": "FeatureTable", r"OwnAdapter": "CustomAdapter",
    r"\bFrame\b": "ImageTransform", r"\bworths\b": "ranking", r"\bsoftly\b": "Soft-NMS",
    r"\blaboratory\b": "ablation", r"\bnetwork frame\b": "network pixels",
    r"\bjudgements?\b": "prediction", r"\bquestions? \d": "ablation",
}  # fmt: skip


def names_in(source: str) -> set[str]:
    """The identifiers of a file."""
    return {t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NAME}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CODE, ids=named)
def test_gone_names_are_gone(path: Path):
    back = names_in(path.read_text()) & GONE_NAMES.keys()
    assert not back, {name: f"say {GONE_NAMES[name]}" for name in back}


@pytest.mark.parametrize("path", PROSE, ids=named)
def test_gone_words_are_gone(path: Path):
    text = path.read_text()
    back = {match[0]: f"say {word}" for gone, word in GONE_WORDS.items() for match in re.finditer(gone, text)}
    assert not back


def test_a_gone_word_would_be_noticed():
    assert names_in("def f(worth): return worth.found") & GONE_NAMES.keys() == {"worth", "found"}
    assert re.search(next(w for w in GONE_WORDS if "softly" in w), "suppressed softly")
