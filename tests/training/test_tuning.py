"""The settings of the stage, chosen on val: what helps is used, what harms or hardly helps is left out."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iou_refiner.coco import GroundTruth, Results, read_ground_truth, xywh_to_xyxy
from iou_refiner.detector.sources import feature_source
from iou_refiner.head.checkpoint import Head
from iou_refiner.head.iou_head import Prediction
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training import tuning
from iou_refiner.training.tuning import Choice, choose_settings, own_behaviour
from tests.kit.toys import OracleHead, make_dataset


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    path, detector = make_dataset(folder, 6)
    truth, source = read_ground_truth(path), feature_source(detector, folder)
    return truth, source, Results.concat(dump_candidates(source, None, truth))


def choose(head: Head, scene: Any, **options: Any) -> Choice:
    """What is chosen for a head on the toy data set."""
    truth, source, candidates = scene

    def run(stage_settings: StageSettings) -> Results:
        return Results.concat(rescore(source, None, Stage(head, stage_settings), candidates, truth))

    return choose_settings(head, run, truth, **options)


class PerImage(OracleHead):
    """An oracle that sees one image at a time, and finds out which one it is."""

    def __init__(self, truth: GroundTruth, *, knows: bool):
        rows = truth.by_image()
        super().__init__([torch.from_numpy(xywh_to_xyxy(truth.bbox[rows[i.id]])).float() for i in truth.images])
        self.everything, self.knows = self.gt_boxes, knows

    def encode(self, features):
        # Which image this is shows in its pixels: the objects are its only bright ones.
        bright = features.levels[0][0, 0] > 0.5
        inside = [all(bright[int(y1) + 1, int(x1) + 1] for x1, y1, *_ in boxes) for boxes in self.everything]
        sizes = [abs(float((b[:, 2:] - b[:, :2]).prod(1).sum()) - float(bright.sum())) for b in self.everything]
        fits = [index for index, ok in enumerate(inside) if ok and sizes[index] < 1]
        self.gt_boxes = [self.everything[fits[0]]]
        return super().encode(features)

    def forward(self, table, boxes, image_index, labels=None, level=None):
        iou, _ = super().forward(table, boxes, image_index, labels, level)
        return Prediction(iou, iou) if self.knows else Prediction(1 - iou, 1 - iou)


def test_a_head_that_knows_is_put_to_use(scene):
    choice = choose(PerImage(scene[0], knows=True), scene)
    chosen, record = choice.settings, choice.trials
    assert chosen.rank_alpha > 0
    assert chosen.ascent_steps > 0
    # The settings chosen are among the trials, and none measured better by more than the trifles passed over.
    ap = next(t["AP"] for t in record if all(t[name] == value for name, value in asdict(chosen).items()))
    assert ap > record[0]["AP"] + 0.1
    assert ap >= max(t["AP"] for t in record) - 0.004
    assert choice.sure
    assert choice.interval[0] > 0
    assert (choice.before, choice.after, choice.best) == (record[0]["AP"], ap, ap)
    assert re.fullmatch(r"val AP \d+\.\d -> \d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", str(choice))


def test_a_head_that_misleads_is_left_out(scene):
    choice = choose(PerImage(scene[0], knows=False), scene)
    chosen, record = choice.settings, choice.trials
    assert chosen.rank_alpha == 0
    assert chosen.regression_steps == 0
    assert chosen.ascent_steps == 0
    assert chosen.score_alpha == 0
    assert min(t["AP"] for t in record) < record[0]["AP"] - 0.05


def test_a_setting_is_not_changed_for_a_trifle(scene, monkeypatch):
    trifles = cycle([0.0, 0.0009, 0.0004])
    monkeypatch.setattr(
        tuning, "evaluate", lambda *_: SimpleNamespace(metrics={"AP": 0.3 + next(trifles), "AP50": 0.5})
    )
    choice = choose(PerImage(scene[0], knows=True), scene)
    chosen, record = choice.settings, choice.trials
    assert asdict(chosen) == {name: value for name, value in record[0].items() if name not in ("AP", "AP50")}


@pytest.mark.parametrize("low", [-0.004, 0.0, float("nan")])
def test_a_gain_that_is_not_sure_leaves_the_detector_as_it_is(scene, monkeypatch, low):
    monkeypatch.setattr(tuning, "compare", lambda *_, **__: SimpleNamespace(intervals={"AP": (low, 0.3)}))
    choice = choose(PerImage(scene[0], knows=True), scene, own_threshold=0.6)
    assert choice.settings == StageSettings.detector_only(nms_threshold=0.6)
    assert not choice.sure
    assert choice.after == choice.before < choice.best
    assert asdict(choice.settings) == {k: v for k, v in choice.trials[0].items() if k not in ("AP", "AP50")}
    assert "the detector's own behaviour is recommended" in str(choice)


def test_a_detector_without_nms_does_not_get_one():
    assert own_behaviour(None).nms == "none"
    assert own_behaviour(0.65) == StageSettings.detector_only(nms_threshold=0.65)


def test_progress_counts_every_trial(scene):
    seen = []
    record = choose(PerImage(scene[0], knows=True), scene, progress=lambda *said: seen.append(said)).trials
    assert seen == [("choosing settings", n, len(record)) for n in range(1, len(record) + 1)]


class ByMove:
    """An evaluation that knows the AP of the detector and of each move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, own: float, moves: list[float], low: float):
        self.aps = dict(zip((0.0, 0.25, 0.5, 0.75, 1.0), moves, strict=True))
        self.own, self.compared = own, []

        def evaluate(settings: StageSettings, _: GroundTruth) -> Any:
            ap = self.aps[settings.sibling_move] if settings.siblings else self.own
            return SimpleNamespace(metrics={"AP": ap, "AP50": 0.9})

        def compare(before: StageSettings, after: StageSettings, *_: Any, **__: Any) -> Any:
            self.compared.append((before, after))
            return SimpleNamespace(intervals={"AP": (low, 0.3)})

        monkeypatch.setattr(tuning, "evaluate", evaluate)
        monkeypatch.setattr(tuning, "compare", compare)


@pytest.mark.parametrize(
    ("moves", "best"),
    [
        ([0.31, 0.34, 0.36, 0.35, 0.30], 0.5),
        ([0.31, 0.3104, 0.3109, 0.3, 0.3], 0.0),  # not changed for a trifle
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1.0),
    ],
)
def test_of_a_head_that_listens_to_siblings_the_best_move_is_taken(scene, monkeypatch, moves, best):
    known = ByMove(monkeypatch, 0.3, moves, low=0.002)
    choice = choose_settings(SiblingHead(), lambda settings: settings, scene[0], own_threshold=0.6)
    assert choice.settings == StageSettings.by_siblings(move=best)
    assert known.compared == [(StageSettings.detector_only(nms_threshold=0.6), choice.settings)]
    assert [trial["AP"] for trial in choice.trials] == [0.3, *moves]
    assert [trial["siblings"] for trial in choice.trials] == [False] + [True] * 5
    assert (choice.before, choice.after) == (0.3, known.aps[best])


@pytest.mark.parametrize("low", [-0.001, 0.0, float("nan")])
def test_siblings_that_do_not_surely_gain_leave_the_detector_as_it_is(scene, monkeypatch, low):
    ByMove(monkeypatch, 0.3, [0.35] * 5, low)
    head = SiblingHead()
    choice = choose_settings(head, lambda settings: settings, scene[0], own_threshold=0.6)
    assert choice.settings == StageSettings.detector_only(nms_threshold=0.6)
    choice.keep_in(head)
    assert Stage(head).settings == choice.settings


def test_few_validation_images_are_said():
    said: list[str] = []
    choice = Choice(StageSettings.by_siblings(), [], 0.3, 0.35, (0.01, 0.09), True)
    choice.say(99, said.append)
    assert "sibling_move 0.5" in said[0]
    assert "small (99 images, about 100 or more are needed)" in said[1]
    assert said[2] == "val AP 30.0 -> 35.0 [+1.0, +9.0]"
    choice.say(100, said.append)
    assert len(said) == 5
