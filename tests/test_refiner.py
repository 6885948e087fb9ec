from __future__ import annotations

import numpy as np
import pytest
import torch

from iou_refiner import DataError, Detections, FeatureMaps, IoUPredictor, IoURefiner, Stage
from iou_refiner.boxes import paired_iou, pairwise_iou
from iou_refiner.coco import Image, read_ground_truth
from iou_refiner.detector.features import extract_image
from iou_refiner.detector.registry import as_adapter, detector_from_spec, installed_adapters
from iou_refiner.stage.nms import soft_nms
from tests.kit.toys import SIZE, OracleHead, ToyDetector, make_dataset


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    path, detector = make_dataset(folder, 3)
    truth = read_ground_truth(path)
    seen = [extract_image(detector, folder, image) for image in truth.images]
    features = FeatureMaps(
        tuple(torch.cat([e.features.levels[i] for e in seen]) for i in (0, 1)), (1, 2), ((SIZE, SIZE),) * 3
    )
    rows = truth.by_image()
    boxes = [torch.from_numpy(truth.bbox[rows[image.id]]).float() for image in truth.images]
    objects = [torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1) for b in boxes]
    images = [detector.prepare(np.asarray(_open(folder, image)))[0] for image in truth.images]
    return features, [e.candidates for e in seen], objects, detector, images


def _open(folder, image: Image):
    from iou_refiner.detector.features import open_image

    return open_image(folder, image)


@pytest.fixture
def head() -> IoUPredictor:
    torch.manual_seed(0)
    return IoUPredictor((4, 4), (1, 2), width=3, hidden=(16,), output_size=3).eval()


# Algorithm 1, and the class score left alone.
PLAIN = {"nms": "iou", "nms_threshold": 0.5, "rank_alpha": 0.75, "score_alpha": 0.0}


class TestStage:
    def test_with_an_oracle_every_object_gets_one_box_that_fits(self, scene):
        features, candidates, objects, _, _ = scene
        stage = Stage(OracleHead(objects), **PLAIN, steps=30, step_size=0.1)
        for kept, truth, given in zip(stage(features, candidates), objects, candidates, strict=True):
            assert len(kept) == len(truth)
            best = pairwise_iou(kept.boxes, truth).amax(1)
            assert best.min() > 0.97
            assert best.min() > pairwise_iou(given.boxes, truth).amax()
            torch.testing.assert_close(kept.ious, best, atol=1e-4, rtol=0)

    def test_each_part_alone(self, scene):
        features, candidates, objects, _, _ = scene
        oracle = OracleHead(objects)
        plain = Stage(oracle, **PLAIN | {"nms": "greedy"}, steps=0)(features, candidates)
        own = ToyDetector.own_suppression(features, candidates)
        for ours, theirs in zip(plain, own, strict=True):
            assert torch.equal(ours.boxes, theirs.boxes)
            assert torch.equal(ours.scores, theirs.scores)
        guided = Stage(oracle, **PLAIN, steps=0)(features, candidates)
        assert sum(d.ious.amax() for d in guided) > sum(d.ious.amax() for d in plain)
        for ours, theirs, given in zip(guided, plain, candidates, strict=True):
            assert ours.ious.amax() >= theirs.ious.amax()
            assert ours.scores.max() == given.scores.max()  # the score of the cluster, not of the box
        moved = Stage(oracle, **PLAIN | {"nms": "greedy"}, steps=5)(features, candidates)
        for ours, theirs in zip(moved, plain, strict=True):
            # Some met on one object and are one now; of those that are left, each fits better than it did.
            before = dict(zip(theirs.scores.tolist(), theirs.ious.tolist(), strict=True))
            gain = ours.ious - torch.tensor([before[score] for score in ours.scores.tolist()])
            assert gain.min() >= -1e-6
            assert gain.max() > 0.01
        scored = Stage(oracle, **PLAIN | {"nms": "greedy", "score_alpha": 0.5}, steps=0)(features, candidates)
        for ours in scored:
            assert (ours.scores.diff() <= 0).all()
            assert (ours.ious.diff() <= 0).sum() >= len(ours) - 2
        assert all(
            len(d) == len(c) for d, c in zip(Stage(oracle, nms="none")(features, candidates), candidates, strict=True)
        )

    def test_worth_ranks_and_climbs_and_the_iou_scores(self, scene):
        features, candidates, objects, _, _ = scene

        class Ordered(OracleHead):
            """Knows which box fits best, and believes that all of them fit by half."""

            def judge(self, *args):
                _, worths = super().judge(*args)
                return torch.full_like(worths, 0.5), worths

        ordered, oracle = Ordered(objects), OracleHead(objects)
        for nms in ("iou", "soft"):
            settings = PLAIN | {"nms": nms, "steps": 5}
            for ours, theirs in zip(
                Stage(ordered, **settings)(features, candidates), Stage(oracle, **settings)(features, candidates),
                strict=True,
            ):  # fmt: skip
                assert torch.equal(ours.boxes, theirs.boxes)
                assert torch.equal(ours.scores, theirs.scores)
                assert (ours.ious == 0.5).all()
                assert ours.worths is None
            scored = Stage(ordered, **settings | {"score_alpha": 1.0})(features, candidates)
            assert all((d.scores == 0.5).all() for d in scored)

    def test_moves_that_make_a_box_worth_no_more_are_put_back(self, scene):
        features, candidates, objects, _, _ = scene

        class Misled(OracleHead):
            """Knows how well boxes fit, and believes that all objects lie to the right."""

            def move(self, pyramid, boxes, image_index):
                return boxes + boxes.new_tensor([6.0, 0, 6, 0])

        head = Misled(objects)
        head.regress = True
        unsuppressed = PLAIN | {"nms": "none"}
        still = Stage(head, **unsuppressed, moves=0, steps=0)(features, candidates)
        stage = Stage(head, **unsuppressed, moves=1, steps=0)
        for ours, theirs in zip(stage(features, candidates), still, strict=True):
            moved = (ours.boxes != theirs.boxes).any(1)
            assert (ours.ious >= theirs.ious).all()
            assert torch.equal(ours.ious > theirs.ious, moved)  # some do lie to the right
        assert 0 < stage.summary.moved < stage.summary.refined
        for settings in ({"moves": 1, "steps": 0}, {"moves": 0, "steps": 5}):
            wary = Stage(head, **unsuppressed, **settings, margin=1.0)(features, candidates)
            assert all(torch.equal(ours.boxes, theirs.boxes) for ours, theirs in zip(wary, still, strict=True))

    def test_soft_suppression(self, scene):
        features, candidates, objects, _, _ = scene
        oracle = OracleHead(objects)
        still = PLAIN | {"nms": "soft", "nms_threshold": 0.9, "moves": 0, "steps": 0}
        classic = Stage(oracle, **still | {"nms_threshold": 1.0, "rank_alpha": 0.0})(features, candidates)
        for ours, given in zip(classic, candidates, strict=True):
            keep, scores = soft_nms(given.boxes, given.scores, given.labels)
            assert torch.equal(ours.boxes, given.boxes[keep])
            torch.testing.assert_close(ours.scores, scores)
        guided = Stage(oracle, **still | {"nms": "iou"})(features, candidates)
        ranked = Stage(oracle, **still)(features, candidates)
        for ours, hard in zip(ranked, guided, strict=True):
            before = {tuple(box): score for box, score in zip(hard.boxes.tolist(), hard.scores.tolist(), strict=True)}
            share = ours.scores / torch.tensor([before[tuple(box)] for box in ours.boxes.tolist()])
            assert share.max() <= 1 + 1e-6
            assert share.min() < 0.9
            # Whoever fits best keeps its whole score: nobody ranks above it.
            assert share[ours.ious.argmax()].item() == pytest.approx(1)

    def test_source_joins_what_came_out_with_what_went_in(self, scene, head):
        features, candidates, _, _, _ = scene
        given = [d.replace(source=torch.arange(len(d))) for d in candidates]
        for out, before in zip(Stage(head, moves=0, steps=0)(features, given), given, strict=True):
            assert torch.equal(out.boxes, before.boxes[out.source])

    def test_images_of_a_batch_do_not_touch_each_other(self, scene, head):
        features, candidates, _, _, _ = scene
        stage = Stage(head)
        together = stage(features, candidates)
        for index in range(3):
            maps = FeatureMaps(tuple(level[index : index + 1] for level in features.levels), (1, 2), ((SIZE, SIZE),))
            (alone,) = stage(maps, [candidates[index]])
            torch.testing.assert_close(alone.boxes, together[index].boxes, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(alone.ious, together[index].ious, atol=1e-5, rtol=1e-5)

    def test_plain_no_grad_and_inference_mode_agree(self, scene, head):
        features, candidates, _, _, _ = scene
        results = [Stage(head)(features, candidates)]
        with torch.no_grad():
            results.append(Stage(head)(features, candidates))
        with torch.inference_mode():
            inside = FeatureMaps(tuple(level.clone() for level in features.levels), (1, 2), features.image_sizes)
            boxes = [Detections(c.boxes.clone(), c.scores.clone(), c.labels.clone()) for c in candidates]
            results.append(Stage(head)(inside, boxes))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a.boxes, b.boxes)
                assert torch.equal(a.scores, b.scores)
                assert torch.equal(a.ious, b.ious)

    def test_features_that_are_not_finite_leave_boxes_as_they_were_and_are_counted(self, scene, head):
        features, candidates, _, _, _ = scene
        levels = tuple(level.clone() for level in features.levels)
        levels[0][1] = torch.nan
        stage = Stage(head, **PLAIN | {"score_alpha": 0.5}, steps=5)
        out = stage(FeatureMaps(levels, (1, 2), features.image_sizes), candidates)
        expected = Stage(head, **PLAIN | {"nms": "greedy"}, moves=0, steps=0)(features, candidates)[1]
        assert torch.equal(out[1].boxes, expected.boxes)  # what the detector itself would have said
        assert torch.equal(out[1].scores, expected.scores)
        assert (out[1].ious == 0).all()
        for detections in out:
            assert torch.isfinite(detections.boxes).all()
            assert torch.isfinite(detections.scores).all()
            assert torch.isfinite(detections.ious).all()
        assert stage.summary.unpredicted == len(candidates[1])
        assert f"{len(candidates[1]):,} boxes without a prediction" in str(stage.summary)

    def test_boxes_that_are_not_finite_do_not_come_out(self, scene, head):
        features, candidates, _, _, _ = scene
        boxes = candidates[0].boxes.clone()
        boxes[0], boxes[1] = torch.nan, torch.tensor([5.0, 5, torch.inf, 9])
        out = Stage(head)(features, [candidates[0].replace(boxes=boxes), *candidates[1:]])
        assert torch.isfinite(out[0].boxes).all()

    def test_boxes_stay_inside_the_image(self, scene, head):
        features, candidates, _, _, _ = scene
        for detections in Stage(head, step_size=5.0)(features, candidates):
            assert detections.boxes.min() >= 0
            assert detections.boxes.max() <= SIZE
            assert (detections.boxes[:, 2:] > detections.boxes[:, :2]).all()

    def test_empty_images_and_limits(self, scene, head):
        features, candidates, _, _, _ = scene
        none = candidates[0][:0]
        out = Stage(head, max_detections=2)(features, [none, candidates[1], none])
        assert [len(d) for d in out] == [0, min(2, len(out[1])), 0]
        assert all(d.ious is not None for d in out)
        stage = Stage(head, nms="none", refine_top=3)
        stage(features, candidates)
        assert stage.summary.refined == 9

    def test_candidates_are_not_mutated(self, scene, head):
        features, candidates, _, _, _ = scene
        before = [d.boxes.clone() for d in candidates]
        Stage(head)(features, candidates)
        assert all(torch.equal(a, d.boxes) and d.ious is None for a, d in zip(before, candidates, strict=True))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"nms": "guided"}, "`nms` must be one of 'iou', 'greedy'"),
            ({"rank_alpha": 2}, r"`rank_alpha` must lie in \[0, 1\], got 2"),
            ({"steps": -1}, "0 or more"),
            ({"step_size": float("nan")}, "`step_size`"),
            ({"stepz": 3}, r"`setting` must be one of .*got 'stepz'. Did you mean 'steps'"),
        ],
    )
    def test_wrong_settings_are_named(self, head, wrong, message):
        with pytest.raises(ValueError, match=message):
            Stage(head, **wrong)


class TestIoURefiner:
    def test_without_a_head_it_is_the_detector(self, scene):
        _, _, _, detector, images = scene
        for ours, own in zip(IoURefiner(detector)(images), detector(images), strict=True):
            assert ours.keys() == own.keys()
            assert all(torch.equal(ours[name], own[name]) for name in own)

    def test_with_a_head_the_same_keys_and_ious(self, scene, head, tmp_path):
        _, _, _, detector, images = scene
        head.detector = detector.fingerprint()
        head.save(tmp_path / "head.safetensors")
        for given in (head, tmp_path / "head.safetensors", str(tmp_path / "head.safetensors")):
            for result in IoURefiner(detector, given)(images):
                assert list(result) == ["boxes", "scores", "labels", "ious"]
                assert len({len(value) for value in result.values()}) == 1

    def test_it_gains_what_it_says(self, scene):
        _, _, objects, detector, images = scene
        refined = IoURefiner(detector, OracleHead(objects), steps=20)(images)
        for ours, own, truth in zip(refined, detector(images), objects, strict=True):
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
        head.detector, head.detector_name = "0123456789abcdef", "FasterRCNN"
        with pytest.raises(
            ValueError, match=r"trained on the detector FasterRCNN 0123456789ab, this one is ToyDetector "
        ):
            IoURefiner(detector, head)

    def test_features_of_another_shape_are_refused_in_words(self, scene):
        _, _, _, detector, images = scene
        with pytest.raises(ValueError, match=r"made for 1 levels of \(8,\) channels"):
            IoURefiner(detector, IoUPredictor((8,), (4,)))(images)

    def test_settings_without_a_head_are_refused(self, scene):
        with pytest.raises(ValueError, match="need a `head`"):
            IoURefiner(scene[3], steps=3)


class TestDetectors:
    def test_an_object_nobody_knows_is_named(self):
        with pytest.raises(TypeError, match=r"No adapter for a detector of type torch.nn.modules.linear.Linear"):
            as_adapter(torch.nn.Linear(1, 1))

    def test_the_adapters_of_the_package_are_installed(self):
        assert {"onnx", "torchvision"} <= installed_adapters().keys()

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("nonsense", "is not of the form adapter:name"),
            ("torchvison:fasterrcnn", "Did you mean 'torchvision'"),
            ("nowhere.py:make", "no file nowhere.py"),
            ("json:lodas", "has no function 'lodas'. Did you mean 'loads'"),
        ],
    )
    def test_a_wrong_spec_is_explained(self, spec, message):
        with pytest.raises(DataError, match=message):
            detector_from_spec(spec)

    def test_a_function_in_a_file(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from tests.kit.toys import ToyDetector\n\ndef make():\n    return ToyDetector({})\n"
        )
        assert isinstance(detector_from_spec(f"{tmp_path / 'mine.py'}:make"), ToyDetector)


def test_paired_iou_of_the_oracle_is_exact(scene):
    objects = torch.cat(scene[2])
    torch.testing.assert_close(paired_iou(objects, objects), torch.ones(len(objects)))
