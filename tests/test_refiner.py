"""The wrapper: the detector's own call and its own result, with the stage in the place of its suppression."""

from __future__ import annotations

import pytest
import torch

from iou_refiner import IoUHead, IoURefiner, StageSettings, save_head
from iou_refiner.boxes import pairwise_iou
from iou_refiner.head.config import HeadMetadata, TrainedCategory
from tests.kit import fixtures
from tests.kit.toys import OracleHead, ToyDetector

scene, head = fixtures.scene, fixtures.head


class TestIoURefiner:
    def test_without_a_head_it_is_the_detector(self, scene):
        _, _, _, detector, images = scene
        for ours, own in zip(IoURefiner(detector)(images), detector(images), strict=True):
            assert ours.keys() == own.keys()
            assert all(torch.equal(ours[name], own[name]) for name in own)

    def test_with_a_head_the_same_keys_and_ious(self, scene, head, tmp_path):
        _, _, _, detector, images = scene
        head.metadata = HeadMetadata(fingerprint=detector.fingerprint())
        save_head(head, tmp_path / "head.safetensors")
        for either in (head, tmp_path / "head.safetensors", str(tmp_path / "head.safetensors")):
            for result in IoURefiner(detector, either)(images):
                assert list(result) == ["boxes", "scores", "labels", "ious"]
                assert len({len(value) for value in result.values()}) == 1

    def test_it_gains_what_it_says(self, scene):
        _, _, gt_boxes, detector, images = scene
        refined = IoURefiner(detector, OracleHead(gt_boxes), ascent_steps=20)(images)
        for ours, own, truth in zip(refined, detector(images), gt_boxes, strict=True):
            best = [pairwise_iou(r["boxes"][:1], truth).amax().item() for r in (ours, own)]
            assert best[0] > best[1]

    def test_a_detector_in_training_mode_is_left_alone(self, scene, head):
        _, _, _, detector, images = scene
        refiner = IoURefiner(detector, head)
        try:
            detector.train()
            assert "ious" not in refiner(images)[0]
        finally:
            detector.eval()

    def test_the_head_of_another_detector_is_refused(self, scene, head):
        _, _, _, detector, _ = scene
        head.metadata = HeadMetadata(detector_name="FasterRCNN", fingerprint="0123456789abcdef")
        with pytest.raises(
            ValueError, match=r"trained on the detector FasterRCNN 0123456789ab, this one is ToyDetector "
        ):
            IoURefiner(detector, head)

    def test_features_of_another_shape_are_refused_in_words(self, scene):
        _, _, _, detector, images = scene
        with pytest.raises(ValueError, match=r"made for 1 levels of \(8,\) channels"):
            IoURefiner(detector, IoUHead((8,), (4,)))(images)

    def test_settings_without_a_head_are_refused(self, scene):
        with pytest.raises(ValueError, match="need a `head`"):
            IoURefiner(scene.detector, ascent_steps=3)
        with pytest.raises(ValueError, match="need a `head`"):
            IoURefiner(scene.detector, settings=StageSettings())

    def test_settings_come_from_the_head_unless_given(self, scene, head):
        detector = scene.detector
        head.metadata = HeadMetadata(recommended={"rank_alpha": 0.125, "nms": "greedy"})
        assert IoURefiner(detector, head).stage.settings == StageSettings(rank_alpha=0.125, nms="greedy")
        changed = IoURefiner(detector, head, rank_alpha=0.25).stage.settings
        assert changed == StageSettings(rank_alpha=0.25, nms="greedy")
        chosen = IoURefiner(detector, head, StageSettings.paper(), score_alpha=0.5).stage.settings
        assert chosen == StageSettings.paper().replace(score_alpha=0.5)

    def test_with_the_settings_of_the_detector_it_is_the_detector(self, scene, head):
        _, _, _, detector, images = scene
        refiner = IoURefiner(detector, head, StageSettings.detector_only())
        for ours, own in zip(refiner(images), detector(images), strict=True):
            assert all(torch.equal(ours[name], own[name]) for name in own)
            assert ((ours["ious"] >= 0) & (ours["ious"] <= 1)).all()

    def test_as_an_object_of_the_detectors_own_class(self, scene, head):
        _, _, _, detector, images = scene
        refiner = IoURefiner(detector, head)
        native = refiner.native()
        assert type(native) is ToyDetector
        assert native is not detector
        assert next(native.parameters()) is next(detector.parameters())
        for ours, same in zip(native(images), refiner(images), strict=True):
            assert all(torch.equal(ours[name], same[name]) for name in same)
        assert "ious" not in detector(images)[0]
        assert IoURefiner(detector).native() is detector

    def test_no_images_give_no_results(self, scene, head):
        detector = scene.detector
        for refiner in (IoURefiner(detector), IoURefiner(detector, head)):
            assert refiner([]) == []
            assert refiner(()) == []

    def test_categories_beyond_the_training_keep_the_detectors_suppression_and_are_told_once(self, scene, head):
        _, _, _, detector, images = scene
        head.metadata = HeadMetadata(categories=(TrainedCategory(7, "car", 7),))
        refiner = IoURefiner(detector, head)
        with pytest.warns(UserWarning, match=r"not trained on \(it was on car\).*all_categories=True") as told:
            results = refiner(images)
        assert len(told) == 1
        for ours, own in zip(results, detector(images), strict=True):
            assert all(torch.equal(ours[name], own[name]) for name in own)
            assert (ours["ious"] == 0).all()
        refiner(images)  # warnings are errors here: a second one would end the test
        IoURefiner(detector, head, all_categories=True)(images)
        with pytest.warns(UserWarning, match="not trained on"):
            IoURefiner(detector, head).native()(images)
