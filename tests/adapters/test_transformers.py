"""What is particular to the adapter of transformers: pipelines, processors, names, and boxes beyond the image."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from iou_refiner import DataError, Detections, FeatureMaps, HeadConfig, IoUHead, IoURefiner
from iou_refiner.adapters.transformers import ObjectDetector, TransformersAdapter
from tests.adapters import cases_transformers
from tests.adapters.case import assert_same, keep_all, noise
from tests.kit.needs import needs_package


def with_ious(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A suppression that turns the order of the candidates around and gives each an IoU."""
    return [
        image[torch.arange(len(image)).flip(0)].replace(ious=torch.linspace(0.2, 0.8, len(image)))
        for image in candidates
    ]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return needs_package("transformers")


@pytest.fixture(scope="module", params=["rt_detr", "detr"])
def case(request: pytest.FixtureRequest) -> Any:
    return cases_transformers.CASES[request.param]()


def pipeline_of(case: Any) -> Any:
    return needs_package("transformers").pipeline(
        "object-detection", model=case.adapter.model, image_processor=case.adapter.processor, device="cpu"
    )


def assert_same_annotations(results: Any, expected: Any) -> None:
    """Boxes to a pixel: a pipeline cuts them to whole numbers, and 41.99999 is not 42."""
    assert [len(each) for each in results] == [len(each) for each in expected]
    for one, other in zip(chain.from_iterable(results), chain.from_iterable(expected), strict=True):
        assert (one["label"], one["score"]) == (other["label"], other["score"])
        assert all(abs(one["box"][side] - other["box"][side]) <= 1 for side in other["box"])


class TestPipeline:
    def test_own_selection_gives_its_own_result(self, case: Any) -> None:
        pipeline = pipeline_of(case)
        adapter = TransformersAdapter(pipeline)
        assert adapter.detector is pipeline
        for threshold in ({}, {"threshold": 0.4}):
            own, results = pipeline(case.images, **threshold), adapter.run(keep_all, case.images, **threshold)
            assert any(own)
            assert_same_annotations(results, own)
            assert not any("iou" in detection for detection in chain.from_iterable(results))
        assert_same_annotations([adapter.run(keep_all, case.images[0])], [pipeline(case.images[0])])
        assert_same_annotations(adapter.detect(case.images), pipeline(case.images))

    def test_extracts_as_its_model_does(self, case: Any) -> None:
        """All images in one batch, where the pipeline would take them one by one."""
        (features, candidates, transforms), expected = (
            adapter.extract(case.images) for adapter in (TransformersAdapter(pipeline_of(case)), case.adapter)
        )
        assert all(map(torch.equal, features.levels, expected[0].levels))
        assert_same([image.to_dict() for image in candidates], [image.to_dict() for image in expected[1]])
        assert transforms == expected[2]

    def test_each_detection_holds_the_iou_of_its_row(self, case: Any) -> None:
        adapter = TransformersAdapter(pipeline_of(case))
        for image, result in zip(case.images, adapter.run(with_ious, case.images, threshold=0.4), strict=True):
            (expected,) = with_ious(*adapter.extract([image])[:2])
            expected = expected[expected.scores > 0.4]
            assert len(result) == len(expected) > 0
            names = [case.adapter.model.config.id2label[label] for label in expected.labels.tolist()]
            assert [detection["label"] for detection in result] == names
            assert [detection["score"] for detection in result] == expected.scores.tolist()
            assert [detection["iou"] for detection in result] == expected.ious.tolist()

    def test_twin_is_a_pipeline_and_leaves_its_own_as_it_was(self, case: Any) -> None:
        pipeline = pipeline_of(case)
        before = dict(vars(pipeline)), case.state()
        twin = TransformersAdapter(pipeline).twin(with_ious)
        assert type(twin) is type(pipeline)
        assert next(twin.model.parameters()) is next(pipeline.model.parameters())
        assert all("iou" in detection for detection in chain.from_iterable(twin(case.images)))
        assert (dict(vars(pipeline)), case.state()) == before

    def test_wrapped_with_a_head(self, case: Any) -> None:
        adapter = TransformersAdapter(pipeline_of(case))
        features, _, _ = adapter.extract(case.images)
        head = IoUHead(features.channels, features.strides, HeadConfig(width=4, hidden=(16,), output_size=3))
        results = IoURefiner(adapter, head, nms="none", final_nms="none")(case.images, threshold=0.4)
        assert any(results)
        for detection in chain.from_iterable(results):
            assert sorted(detection) == ["box", "iou", "label", "score"]
            assert 0 <= detection["iou"] <= 1

    def test_batches_and_streams(self) -> None:
        """Images of one size, which is what a pipeline can put into one batch; the suppression gets the batch."""
        case = cases_transformers.CASES["detr"]()
        images = [Image.fromarray(pixels) for pixels in noise((130, 210), (130, 210), (130, 210))]
        sizes = []

        def shortened(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            sizes.append(len(features))
            detections = with_ious(features, candidates)
            return [image[: len(image) - 3 * row] for row, image in enumerate(detections)]  # of different lengths

        twin = TransformersAdapter(pipeline_of(case)).twin(shortened)
        together = twin(images, batch_size=3, threshold=0.0)
        assert sizes == [3]
        assert [len(each) for each in together] == [12, 9, 6]
        streamed = list(twin((image for image in images), batch_size=3, threshold=0.0))
        assert_same_annotations(streamed, together)

    def test_moves_with_its_model(self, case: Any) -> None:
        adapter = TransformersAdapter(pipeline_of(case))
        adapter.detector.device = torch.device("meta")
        assert adapter.to("cpu").detector.device == adapter.device == torch.device("cpu")

    def test_trains_with_its_model(self, case: Any) -> None:
        adapter = TransformersAdapter(pipeline_of(case))
        assert (adapter.training, adapter.name) == (False, "ObjectDetectionPipeline")
        adapter.model.train()
        training = adapter.training
        adapter.model.eval()
        assert training


def test_twins_serve_the_lines_of_the_documentation(case: Any) -> None:
    """Model and processor of the twin, used as one uses transformers' own."""
    twin = case.adapter.twin(with_ious)
    inputs = case.adapter.processor(images=case.images, return_tensors="pt")
    with torch.no_grad():
        outputs = twin.model(**inputs)
    sizes = [(image.height, image.width) for image in case.images]
    results = twin.processor.post_process_object_detection(outputs, 0.0, sizes)
    assert_same(results, case.run(with_ious, case.images))
    as_tensor = twin.processor.post_process_object_detection(outputs, 0.0, target_sizes=torch.tensor(sizes))
    assert_same(as_tensor, results)
    for part, whole, (height, width) in zip(
        twin.processor.post_process_object_detection(outputs, 0.0), results, sizes, strict=True
    ):
        scale = torch.tensor([width, height, width, height])
        torch.testing.assert_close(part["boxes"] * scale, whole["boxes"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"`target_sizes` must give one size per image: got 1 for 3 images"):
        twin.processor.post_process_object_detection(outputs, 0.0, sizes[:1])


def test_boxes_beyond_the_image_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers clips nothing; neither does the way to the network and back."""
    case = cases_transformers.CASES["detr"]()
    last = case.adapter.model.bbox_predictor.layers[-1]
    monkeypatch.setitem(last._parameters, "bias", torch.full_like(last.bias, 3.0))
    own = case.own()
    for result, image in zip(own, case.images, strict=True):
        assert (result["boxes"][:, 2] > image.width + 1).any()
    assert_same(case.run(keep_all, case.images), own, case.tolerance)


def test_padding_is_no_part_of_the_image() -> None:
    """In one batch or alone, an image has the same size in the network, and the same transform."""
    case = cases_transformers.CASES["detr"]()
    features, _, transforms = case.adapter.extract(case.images)
    assert len({tuple(size) for size in features.image_sizes}) == 3
    for image, transform, size in zip(case.images, transforms, features.image_sizes, strict=True):
        alone, _, (own_transform,) = case.adapter.extract([image])
        assert alone.image_sizes == (size,)
        assert own_transform == transform
    assert all(level.shape[2] * 32 >= max(size[0] for size in features.image_sizes) for level in features.levels)


def test_a_suppression_may_give_other_classes_and_scores(case: Any) -> None:
    def relabel(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return [image.replace(labels=image.labels * 0 + 1, scores=image.scores / 4) for image in candidates]

    assert not any(len(result["boxes"]) for result in case.adapter.run(relabel, case.images, threshold=0.25))
    for result in case.adapter.run(relabel, case.images, threshold=0.0):
        assert result["labels"].dtype == torch.int64
        assert set(result["labels"].tolist()) == {1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector saved as transformers saves one."""
    folder: Path = tmp_path_factory.mktemp("saved")
    adapter = cases_transformers.CASES["rt_detr"]().adapter
    adapter.model.save_pretrained(folder)
    adapter.processor.save_pretrained(folder)
    return folder


class TestNames:
    def test_saved_detector(self, folder: Path) -> None:
        case = cases_transformers.CASES["rt_detr"]()
        adapter = TransformersAdapter.from_name(str(folder))
        assert adapter.fingerprint() == case.adapter.fingerprint()
        assert adapter.settings() == case.adapter.settings()
        assert not adapter.detector.training
        assert_same(adapter.detector(case.images, threshold=0.0), case.own())

    def test_model_alone_comes_with_its_processor(self, transformers: Any, folder: Path) -> None:
        model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
        adapter = TransformersAdapter(model)
        assert isinstance(adapter.detector, ObjectDetector)
        assert adapter.settings() == TransformersAdapter.from_name(str(folder)).settings()

    def test_no_such_detector(self, transformers: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be loaded"):
            TransformersAdapter.from_name(str(tmp_path))

    def test_no_processor_beside_the_weights(self, transformers: Any, folder: Path, tmp_path: Path) -> None:
        model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
        model.config._name_or_path = str(tmp_path)
        with pytest.raises(TypeError, match=r"none is saved in .*Pass a pipeline"):
            TransformersAdapter(model)


class TestRefuses:
    def test_models_of_another_kind(self, transformers: Any) -> None:
        with pytest.raises(TypeError, match=r"pipeline or model of RTDetrForObjectDetection, .*got Linear"):
            TransformersAdapter(torch.nn.Linear(2, 2))

    def test_model_from_nowhere_without_a_processor(self, case: Any) -> None:
        with pytest.raises(TypeError, match=r"`processor` is missing.*TransformersAdapter\(model, processor\)"):
            TransformersAdapter(case.adapter.model)

    def test_pipeline_with_a_processor(self, case: Any) -> None:
        with pytest.raises(TypeError, match=r"`processor` must be left out with a pipeline"):
            TransformersAdapter(pipeline_of(case), case.adapter.processor)


def coco_names(count: int) -> dict[int, str]:
    return {0: "person", **{label: f"class {label}" for label in range(1, count - 1)}, count - 1: "toothbrush"}


@pytest.mark.parametrize(("names", "ids"), [(coco_names(80), 90), (coco_names(91), None), ({0: "cat"}, None)])
def test_labels_of_coco_are_told_by_their_names(
    case: Any, names: dict[int, str], ids: int | None, monkeypatch: Any
) -> None:
    """RT-DETR numbers COCO's classes 0 to 79; DETR uses the category ids."""
    monkeypatch.setattr(case.adapter.model.config, "id2label", names)
    told = TransformersAdapter(case.adapter.model, case.adapter.processor).category_ids
    assert (told and told[79]) == ids
    assert told is None or (told[0], told[11], len(set(told.values()))) == (1, 13, 80)


def test_settings_tell_processors_apart(transformers: Any, case: Any) -> None:
    size = {"height": 64, "width": 64}
    other = transformers.RTDetrImageProcessor(size=size)
    assert TransformersAdapter(case.adapter.model, other).settings() != case.adapter.settings()
    again = type(case.adapter.processor)(size=case.adapter.processor.size)
    assert TransformersAdapter(case.adapter.model, again).settings() == case.adapter.settings()
