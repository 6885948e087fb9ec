"""What is particular to mmdet: ways to call it, padded images, levels coarsest first, what it refuses and loads."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iou_refiner import DataError, Detections, FeatureMaps, MissingPackageError
from iou_refiner.adapters.mmdet import MmdetAdapter
from tests.adapters.case import assert_same, keep_all, noise
from tests.adapters.cases_mmdet import SIZES, WARNINGS, MmdetCase, import_mmdet, small_config, small_detector

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


def shifted(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A suppression that keeps three candidates, 5 pixels to the right, each with an IoU."""
    return [
        image[:3].replace(boxes=image.boxes[:3] + torch.tensor([5.0, 0, 5, 0]), ious=torch.tensor([0.9, 0.8, 0.7]))
        for image in candidates
    ]


@pytest.mark.parametrize("name", ["fcos", "yolov3", "yolox", "rtmdet"])
def test_own_suppression_gives_the_detectors_own_result_on_padded_images(name: str) -> None:
    """YOLOX and RTMDet pad to a square in the pipeline, where `img_shape` then holds the padding; YOLOv3 returns the
    coarsest level first, FCOS multiplies scores by a second factor."""
    case = MmdetCase(name, SIZES)
    own = case.as_dicts(case.own())
    assert all(len(result["boxes"]) >= 2 for result in own)
    assert_same(case.as_dicts(case.run(case.own_suppression, case.images)), own, case.tolerance)
    features, _, transforms = case.adapter.extract(case.images)
    assert features.strides == (8, 16, 32)
    assert [level.shape[2] * stride for level, stride in zip(features.levels, features.strides, strict=True)] == [
        features.levels[0].shape[2] * 8
    ] * 3
    for (height, width), transform, size in zip(SIZES, transforms, features.image_sizes, strict=True):
        assert transform.image_size == (height, width)
        corner = transform.to_network(torch.tensor([[0.0, 0, width, height]]))
        torch.testing.assert_close(corner, torch.tensor([[0.0, 0, size[1], size[0]]]), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def mask_rcnn() -> MmdetCase:
    return MmdetCase("mask_rcnn")


@pytest.mark.parametrize("name", ["mask_rcnn", "yolox"])
def test_inference_detector_takes_the_twin(name: str) -> None:
    detector = small_detector(name)
    inference_detector = importlib.import_module("mmdet.apis").inference_detector
    (rgb,) = noise((70, 110))
    adapter = MmdetAdapter(detector)
    instances = inference_detector(adapter.twin(shifted), rgb[:, :, ::-1]).pred_instances
    (expected,) = adapter.run(shifted, [adapter.prepare(rgb)[0]])
    assert torch.equal(instances.ious, torch.tensor([0.9, 0.8, 0.7]))
    for key, values in expected.pred_instances.items():
        assert torch.equal(instances[key], values), key


def test_run_takes_a_batch_as_test_step_does(mask_rcnn: MmdetCase) -> None:
    collate = importlib.import_module("mmengine.dataset").pseudo_collate
    results = mask_rcnn.adapter.run(keep_all, collate(mask_rcnn.images))
    assert_same(mask_rcnn.as_dicts(results), mask_rcnn.as_dicts(mask_rcnn.adapter.run(keep_all, mask_rcnn.images)))
    own = mask_rcnn.adapter.detect(collate(mask_rcnn.images))
    assert_same(mask_rcnn.as_dicts(own), mask_rcnn.as_dicts(mask_rcnn.own()))


@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_mask_rcnn", "retinanet", "gfl"])
def test_candidates_are_those_before_suppression(name: str) -> None:
    case = MmdetCase(name)
    _, candidates, _ = case.adapter.extract(case.images)
    for image, own in zip(candidates, case.as_dicts(case.own()), strict=True):
        assert len(image) > 1.2 * len(own["boxes"])


def test_what_the_suppression_holds_stays_as_it_is(mask_rcnn: MmdetCase) -> None:
    """A mask head scales the boxes it is given in place."""
    held = [image[:3] for image in mask_rcnn.adapter.extract(mask_rcnn.images)[1]]
    before = [image.boxes.clone() for image in held]
    mask_rcnn.run(lambda features, candidates: held, mask_rcnn.images)
    assert all(torch.equal(image.boxes, boxes) for image, boxes in zip(held, before, strict=True))


def test_masks_are_those_of_the_refined_boxes(mask_rcnn: MmdetCase) -> None:
    """mmdet's own mask head, given the moved boxes, paints the same masks."""
    adapter, detector = mask_rcnn.adapter, mask_rcnn.adapter.detector
    (result,) = adapter.run(shifted, mask_rcnn.images[:1])
    (still,) = adapter.run(lambda f, c: [image[:3] for image in c], mask_rcnn.images[:1])
    assert not torch.equal(result.pred_instances.masks, still.pred_instances.masks)
    (detections,) = shifted(*adapter.extract(mask_rcnn.images[:1])[:2])
    instances = importlib.import_module("mmengine.structures").InstanceData(
        bboxes=detections.boxes.clone(), scores=detections.scores, labels=detections.labels
    )
    data = detector.data_preprocessor(importlib.import_module("mmengine.dataset").pseudo_collate(mask_rcnn.images[:1]))
    with torch.no_grad():
        maps = detector.extract_feat(data["inputs"])
        metas = [sample.metainfo for sample in data["data_samples"]]
        (painted,) = detector.roi_head.predict_mask(maps, metas, [instances], rescale=True)
    assert painted.masks.any()
    assert torch.equal(result.pred_instances.masks, painted.masks)


def test_no_proposals(mask_rcnn: MmdetCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The RoI head has nothing to score; the suppression is called all the same, and features are there."""
    monkeypatch.setitem(mask_rcnn.adapter.detector.rpn_head.test_cfg, "min_bbox_size", 1e4)
    features, candidates, _ = mask_rcnn.adapter.extract(mask_rcnn.images)
    assert [len(image) for image in candidates] == [0] * len(features)
    own = mask_rcnn.as_dicts(mask_rcnn.own())
    assert_same(mask_rcnn.as_dicts(mask_rcnn.run(mask_rcnn.own_suppression, mask_rcnn.images)), own)


def test_settings_tell_what_changes_an_extraction(mask_rcnn: MmdetCase, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, detector = mask_rcnn.adapter, mask_rcnn.adapter.detector
    before = adapter.settings()
    assert adapter.settings() == before
    for config in (detector.roi_head.test_cfg, detector.rpn_head.test_cfg, detector.cfg.model.data_preprocessor):
        with monkeypatch.context() as changed:
            changed.setitem(config, next(iter(config)), 0.123)
            assert adapter.settings() != before
    assert adapter.settings() == before


def test_category_ids(mask_rcnn: MmdetCase) -> None:
    detector = mask_rcnn.adapter.detector
    assert mask_rcnn.adapter.category_ids is None
    assert MmdetAdapter(detector, category_ids={0: 7}).category_ids == {0: 7}
    coco = small_detector("mask_rcnn")
    coco.dataset_meta = {"classes": importlib.import_module("mmdet.evaluation").get_classes("coco")}
    ids = MmdetAdapter(coco).category_ids
    assert (len(ids), ids[0], ids[11], ids[79]) == (80, 1, 13, 90)  # person, stop sign, toothbrush


class TestRefuses:
    def test_another_kind(self) -> None:
        import_mmdet()
        with pytest.raises(TypeError, match=r"two-stage detectors with StandardRoIHead .* got Linear\."):
            MmdetAdapter(torch.nn.Linear(2, 2))

    @pytest.mark.parametrize("head", ["PAAHead", "DETRHead", "RTMDetInsHead"])
    def test_heads_that_cannot_do_without_nms_or_have_none(self, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
        detector = small_detector("retinanet")
        kind = getattr(importlib.import_module("mmdet.models.dense_heads"), head)
        other = kind.__new__(kind)
        torch.nn.Module.__init__(other)
        other.prior_generator = detector.bbox_head.prior_generator
        detector._modules["bbox_head"] = other
        with pytest.raises(TypeError, match=rf"can leave out NMS .* got RetinaNet with {head}\."):
            MmdetAdapter(detector)

    def test_without_its_config(self) -> None:
        detector = small_detector("retinanet")
        del detector.cfg
        with pytest.raises(TypeError, match=r"has no config as `\.cfg`.*init_detector"):
            MmdetAdapter(detector)

    def test_versions_that_do_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(name: str) -> Any:
            raise AssertionError("MMCV==9 is used but incompatible.")

        module = "iou_refiner.adapters.mmdet.library.importlib"
        monkeypatch.setattr(module, SimpleNamespace(import_module=refuse))
        with pytest.raises(MissingPackageError, match=r"MMCV==9 is used.*pip install mmdet==3\.3\.0 .*mmcv==2\.1\.0"):
            MmdetAdapter(torch.nn.Linear(2, 2))


class TestFromName:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path]:
        """A config and the weights of a detector made from it."""
        config, weights = tmp_path / "small.py", tmp_path / "weights.pth"
        small_config("retinanet").dump(config)
        meta = {"dataset_meta": {"classes": ("a", "b", "c"), "palette": [(0, 0, 0)] * 3}}
        torch.save({"meta": meta, "state_dict": small_detector("retinanet").state_dict()}, weights)
        return config, weights

    def test_config_and_weights(self, files: tuple[Path, Path]) -> None:
        config, weights = files
        adapter = MmdetAdapter.from_name(f"{config}:{weights}")
        assert adapter.fingerprint() == MmdetAdapter(small_detector("retinanet")).fingerprint()
        assert not adapter.detector.training
        assert adapter.category_ids is None

    def test_weights_of_the_config(self, files: tuple[Path, Path]) -> None:
        config, weights = files
        config.write_text(f"{config.read_text()}\nload_from = {str(weights)!r}\n")
        assert MmdetAdapter.from_name(str(config)).fingerprint()

    def test_no_weights(self, files: tuple[Path, Path]) -> None:
        with pytest.raises(DataError, match=r"names no weights .*mmdet:.*small\.py:WEIGHTS"):
            MmdetAdapter.from_name(str(files[0]))

    def test_no_such_config(self, tmp_path: Path) -> None:
        import_mmdet()
        with pytest.raises(DataError, match=r"The config of an mmdet detector, .*absent\.py.* cannot be read"):
            MmdetAdapter.from_name(str(tmp_path / "absent.py"))

    def test_no_such_weights(self, files: tuple[Path, Path]) -> None:
        with pytest.raises(DataError, match=r"The weights 'absent\.pth' cannot be read"):
            MmdetAdapter.from_name(f"{files[0]}:absent.pth")

    @pytest.mark.parametrize("change", ["missing", "another shape"])
    def test_weights_of_another_detector(self, files: tuple[Path, Path], change: str) -> None:
        config, weights = files
        checkpoint = torch.load(weights)
        weight = checkpoint["state_dict"].pop("bbox_head.retina_cls.weight")
        if change == "another shape":
            checkpoint["state_dict"]["bbox_head.retina_cls.weight"] = weight[:1]
        torch.save(checkpoint, weights)
        with pytest.raises(DataError, match=r"leave 1 of \d+ tensors .* unfilled \(bbox_head\.retina_cls\.weight"):
            MmdetAdapter.from_name(f"{config}:{weights}")

    def test_weights_that_hold_more_than_tensors(self, files: tuple[Path, Path]) -> None:
        config, weights = files
        torch.save({"state_dict": {}, "meta": Path("anything")}, weights)
        with pytest.raises(DataError, match=r"more than tensors: pathlib.*IOU_REFINER_TRUST_PICKLES=1 runs the code"):
            MmdetAdapter.from_name(f"{config}:{weights}")
