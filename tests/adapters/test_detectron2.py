"""What is particular to Detectron2's detectors."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iou_refiner import DataError, Detections, FeatureMaps, HeadConfig, IoUHead, IoURefiner, MissingPackageError
from iou_refiner.adapters.detectron2 import Detectron2Adapter
from iou_refiner.boxes import pairwise_iou
from tests.adapters.case import assert_same, keep_all, noise
from tests.adapters.cases_detectron2 import (
    CASCADE,
    CASES,
    MASK,
    R_CNN,
    RETINANET,
    SIZES,
    Detectron2Case,
    build_fcos,
    detectron2_warns,
    tiny_config,
    tiny_detectron2,
)


@pytest.fixture(scope="module")
def faster() -> Any:
    return tiny_detectron2(tiny_config(R_CNN))


@pytest.fixture(scope="module", params=["mask_rcnn_fpn", "mask_rcnn_c4", "keypoint_rcnn_fpn"])
def with_heads(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]()


def shifted(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A suppression that keeps a few boxes, none where the detector put it."""
    return [image[:4].replace(boxes=image.boxes[:4] * 0.8 + 3) for image in candidates]


# --- inside Detectron2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def predictor(faster: Any) -> Any:
    """Detectron2's DefaultPredictor around the detector."""
    with detectron2_warns():
        from detectron2.engine import DefaultPredictor

        predictor = DefaultPredictor(tiny_config(R_CNN))
    predictor.model = faster
    return predictor


def test_default_predictor_takes_the_refiner_and_the_twin(predictor: Any) -> None:
    adapter, (rgb,) = Detectron2Adapter(predictor.model, **SIZES), noise((70, 110))
    prepared, _ = adapter.prepare(rgb)
    head = IoUHead((16,) * 4, (4, 8, 16, 32), HeadConfig(width=4, hidden=(16,), output_size=3))
    torch.nn.init.normal_(head.iou_output.weight)
    refiner = IoURefiner(adapter, head)
    (expected,) = refiner([prepared])
    assert len(expected["instances"]) >= 2
    for model in (refiner, adapter.twin(refiner.stage)):
        predictor.model = model
        result = predictor(rgb[:, :, ::-1])
        assert_same(*(Detectron2Case.as_dicts(None, [each]) for each in (result, expected)))


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_prepares_as_default_predictor_does(predictor: Any, channels: str) -> None:
    adapter = Detectron2Adapter(predictor.model, **SIZES, input_format=channels)
    predictor.input_format, predictor.model = channels, lambda inputs: inputs
    for rgb in noise((70, 110), (200, 40), (96, 96)):
        expected, (prepared, transform) = predictor(np.ascontiguousarray(rgb[:, :, ::-1])), adapter.prepare(rgb)
        assert torch.equal(prepared["image"], expected["image"])
        assert prepared["image"].dtype == torch.float32
        size = prepared["height"], prepared["width"]
        assert size == (expected["height"], expected["width"]) == transform.image_size


def test_results_follow_height_and_width_where_given(faster: Any) -> None:
    """Without them Detectron2 gives results in pixels of the resized image."""
    adapter = Detectron2Adapter(faster, **SIZES)
    prepared, _ = adapter.prepare(noise((70, 110))[0])
    _, (candidates,), (transform,) = adapter.extract([{"image": prepared["image"]}])
    assert transform.image_size == tuple(prepared["image"].shape[1:])
    (result,) = adapter.run(keep_all, [{"image": prepared["image"]}])
    assert torch.equal(result["instances"].pred_boxes.tensor, candidates.boxes)


# --- what follows suppression ----------------------------------------------------------------------------------------


def test_masks_and_keypoints_are_those_of_the_suppressions_boxes(with_heads: Any) -> None:
    """They are what the detector itself predicts in these boxes when it is given them."""
    from detectron2.structures import Boxes, Instances

    adapter = with_heads.adapter
    features, candidates, _ = adapter.extract(with_heads.images)
    instances = [
        Instances(size, pred_boxes=Boxes(image.boxes), pred_classes=image.labels, scores=image.scores)
        for image, size in zip(shifted(features, candidates), features.image_sizes, strict=True)
    ]
    with torch.no_grad():
        expected = with_heads.as_dicts(adapter.detector.inference(with_heads.images, instances))
    assert_same(with_heads.as_dicts(adapter.run(shifted, with_heads.images)), expected)
    assert {"pred_masks", "pred_keypoints"} & set(expected[0])


def test_twin_leaves_boxes_alone_that_it_is_passed(with_heads: Any) -> None:
    """Test-time augmentation wants the masks of boxes it has merged; nothing there is to be suppressed."""
    detector = with_heads.adapter.detector
    with torch.no_grad():
        boxes = detector.inference(with_heads.images, do_postprocess=False)
        expected, results = (
            with_heads.as_dicts(model.inference(with_heads.images, copy.deepcopy(boxes)))
            for model in (detector, with_heads.adapter.twin(shifted))
        )
    assert len(expected[0]["boxes"]) > 4
    assert_same(results, expected)


def test_boxes_of_the_suppression_stay_in_network_pixels(faster: Any) -> None:
    """Detectron2 scales boxes in place on their way back to the image."""
    adapter, held = Detectron2Adapter(faster, **SIZES), []

    def hold(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        held.extend((image, image.boxes.clone()) for image in candidates)
        return candidates

    adapter.run(hold, [adapter.prepare(noise((70, 110))[0])[0]])
    assert held
    assert all(torch.equal(image.boxes, before) for image, before in held)


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_candidates_are_not_suppressed(name: str) -> None:
    """Those of one class overlap by more than the detector would let pass, and are not limited in number."""
    case = CASES[name]()
    predictors = case.predictors() if hasattr(case.adapter.detector, "roi_heads") else [case.adapter.detector]
    for own in predictors:
        own.test_topk_per_image = own.max_detections_per_image = 3
    _, candidates, _ = case.adapter.extract(case.images)
    for image in candidates:
        overlap = pairwise_iou(image.boxes, image.boxes).triu(1) * (image.labels[:, None] == image.labels)
        assert (overlap > predictors[-1].test_nms_thresh).any()
        assert len(image) > 10


@pytest.mark.parametrize(
    ("name", "strides"),
    [("faster_rcnn_fpn", (4, 8, 16, 32)), ("mask_rcnn_c4", (16,)), ("retinanet", (8, 16, 32, 64, 128))],
)
def test_maps_are_those_of_the_box_head(name: str, strides: tuple[int, ...]) -> None:
    case = CASES[name]()
    features, _, _ = case.adapter.extract(case.images)
    own = case.adapter.detector
    with torch.no_grad():
        maps = own.backbone(own.preprocess_image(case.images).tensor)
    assert features.strides == strides
    names = own.roi_heads.in_features if hasattr(own, "roi_heads") else own.head_in_features
    assert all(torch.equal(level, maps[name]) for level, name in zip(features.levels, names, strict=True))


def test_cascade_candidates_are_the_last_boxes_with_the_mean_of_all_scores() -> None:
    case = CASES["cascade_mask_rcnn_fpn"]()
    own, (image,) = case.adapter.detector, case.images[:1]
    heads, probabilities = own.roi_heads, []
    with torch.no_grad():
        batch = own.preprocess_image([image])
        maps = own.backbone(batch.tensor)
        proposals, _ = own.proposal_generator(batch, maps, None)
        for depth, predictor in enumerate(heads.box_predictor):
            outputs = heads._run_stage([maps[name] for name in heads.in_features], proposals, depth)
            probabilities.append(predictor.predict_probs(outputs, proposals)[0][:, :-1])
            boxes = predictor.predict_boxes(outputs, proposals)
            proposals = heads._create_proposals_from_boxes(boxes, batch.image_sizes)
    scores = torch.stack(probabilities).mean(0)
    rows, labels = torch.nonzero(scores > heads.box_predictor[-1].test_score_thresh, as_tuple=True)
    order = scores[rows, labels].argsort(descending=True)
    _, (candidates,), _ = case.adapter.extract([image])
    assert torch.equal(candidates.labels, labels[order])
    torch.testing.assert_close(candidates.scores, scores[rows, labels][order])
    torch.testing.assert_close(candidates.boxes, proposals[0].proposal_boxes.tensor[rows][order])


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_dense_candidates_may_reach_beyond_the_image_and_results_do_not(name: str) -> None:
    case = CASES[name]()
    _, candidates, _ = case.adapter.extract(case.images)
    results = case.as_dicts(case.run(keep_all, case.images))
    for image, result, rgb in zip(candidates, results, case.rgb, strict=True):
        assert (image.boxes < 0).any()
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([rgb.shape[1], rgb.shape[0]] * 2)).all()


def test_settings_tell_what_decides_an_extraction(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = tiny_detectron2(tiny_config(R_CNN, CASCADE))
    settings = {Detectron2Adapter(detector).settings(), Detectron2Adapter(detector, min_size=600).settings()}
    settings.add(Detectron2Adapter(detector, input_format="RGB").settings())
    monkeypatch.setattr(detector.roi_heads.box_predictor[-1], "test_score_thresh", 0.9)
    settings.add(Detectron2Adapter(detector).settings())
    monkeypatch.setattr(detector.proposal_generator, "post_nms_topk", {True: 10, False: 10})
    settings.add(Detectron2Adapter(detector).settings())
    detector.pixel_mean += 1  # no part of the weights, and so of the fingerprint
    settings.add(Detectron2Adapter(detector).settings())
    assert len(settings) == 6


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(faster: Any, tmp_path: Path) -> Path:
    """A folder with the config of the detector and its weights."""
    (tmp_path / "config.yaml").write_text(tiny_config(R_CNN, {"DATASETS.TEST": ("coco_2017_val",)}).dump())
    torch.save({"model": faster.state_dict()}, tmp_path / "weights.pth")
    return tmp_path


def test_config_and_weights_by_name(faster: Any, saved: Path) -> None:
    adapter = Detectron2Adapter.from_name(f"{saved / 'config.yaml'}:{saved / 'weights.pth'}")
    assert adapter.fingerprint() == Detectron2Adapter(faster).fingerprint()
    assert not adapter.detector.training
    assert (adapter.min_size, adapter.max_size, adapter.input_format) == (96, 160, "BGR")
    assert list(adapter.category_ids.items())[:13][-2:] == [(11, 13), (12, 14)]


def test_model_zoo_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the download: the config is found, and the weights asked for are those trained with it."""
    tiny_config()
    with detectron2_warns():
        importlib.import_module("detectron2.model_zoo")
    from detectron2.checkpoint import DetectionCheckpointer

    def offline(self: Any, path: str) -> None:
        raise OSError(path)

    monkeypatch.setattr(DetectionCheckpointer, "load", offline)
    with pytest.raises(DataError, match=r"cannot be read \(https://.*faster_rcnn_R_50_FPN_3x/.*/model_final_280758"):
        Detectron2Adapter.from_name("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")
    with pytest.raises(
        DataError, match=r"COCO-Detection/nothing\.yaml is neither a file nor a trained config of the model zoo"
    ):
        Detectron2Adapter.from_name("COCO-Detection/nothing.yaml")


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_3x", "config.yaml.bak", "config.yamlweights.pth"])
def test_names_of_another_form(name: str) -> None:
    tiny_config()
    with pytest.raises(DataError, match=r"named by CONFIG\.yaml or CONFIG\.yaml:WEIGHTS, got"):
        Detectron2Adapter.from_name(name)


def test_config_that_is_none(tmp_path: Path) -> None:
    tiny_config()
    (tmp_path / "other.yaml").write_text("MODEL: {DEPTH: 50}")
    with pytest.raises(DataError, match=r"other\.yaml is not a config of Detectron2 \(.*MODEL\.DEPTH"):
        Detectron2Adapter.from_name(str(tmp_path / "other.yaml"))


def test_weights_that_do_not_fill_the_detector(faster: Any, saved: Path) -> None:
    """Detectron2 logs what is missing and goes on with random numbers."""
    backbone = {name: value for name, value in faster.state_dict().items() if name.startswith("backbone")}
    torch.save({"model": backbone}, saved / "backbone.pth")
    (saved / "text.pth").write_text("no weights")
    for weights, message in [
        (saved / "backbone.pth", r"leave \d+ of \d+ tensors of the detector unfilled \(proposal_generator"),
        ("", r"The weights '' leave (\d+) of \1 tensors"),
        (saved / "nowhere.pth", r"nowhere\.pth' cannot be read"),
        (saved / "text.pth", r"text\.pth' cannot be read"),
    ]:
        with pytest.raises(DataError, match=message):
            Detectron2Adapter.from_name(f"{saved / 'config.yaml'}:{weights}")


def test_category_ids(faster: Any) -> None:
    assert Detectron2Adapter(faster).category_ids is None
    assert Detectron2Adapter(faster, category_ids={0: 7}).category_ids == {0: 7}
    coco = Detectron2Adapter(build_fcos(tiny_config(RETINANET), num_classes=80)).category_ids
    assert (len(coco), coco[0], coco[79]) == (80, 1, 90)


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PanopticFPN", "SemanticSegmentor", "ProposalNetwork"])
def test_other_architectures_by_name(kind: str) -> None:
    cfg = tiny_config(R_CNN, MASK, {"MODEL.META_ARCHITECTURE": kind})
    from detectron2.modeling import build_model

    detector = build_model(cfg)
    with pytest.raises(TypeError, match=rf"no panoptic, semantic or rotated detector\), got {kind}\."):
        Detectron2Adapter(detector)


def test_rotated_heads_by_name(faster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.modeling.roi_heads import RROIHeads

    monkeypatch.setattr(faster.roi_heads, "__class__", RROIHeads)  # building them needs Detectron2's compiled part
    with pytest.raises(TypeError, match=r"got GeneralizedRCNN with RROIHeads\."):
        Detectron2Adapter(faster)


def test_arguments_out_of_range(faster: Any) -> None:
    with pytest.raises(ValueError, match=r"`input_format` must be one of 'BGR', 'RGB', got 'rgb'"):
        Detectron2Adapter(faster, input_format="rgb")
    with pytest.raises(ValueError, match=r"`max_size` must be a finite number above 0, got 0"):
        Detectron2Adapter(faster, max_size=0)


def test_without_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2.modeling", None)
    with pytest.raises(MissingPackageError, match=r"needs detectron2\.modeling.*pip install .*detectron2@.*tested"):
        Detectron2Adapter(torch.nn.Linear(2, 2))


def test_with_a_detectron2_that_breaks_on_its_own_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(name: str) -> Any:
        raise AttributeError("module 'PIL.Image' has no attribute 'LINEAR'")

    monkeypatch.setattr(importlib, "import_module", old)
    with pytest.raises(MissingPackageError, match=r"not importable \(module 'PIL\.Image' has no .*pip install"):
        Detectron2Adapter(torch.nn.Linear(2, 2))
