"""What is particular to torchvision's detectors."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import detection

from iou_refiner import DataError
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.detector.registry import detector_from_spec
from tests.adapters.case import noise
from tests.adapters.cases_torchvision import tiny, tiny_case

DENSE = ["retinanet", "fcos", "ssd", "ssdlite"]


def test_names_what_it_does_not_take() -> None:
    with pytest.raises(TypeError, match=r"`detector` must be one of torchvision's: Faster.*, SSD; got Linear"):
        TorchvisionAdapter(nn.Linear(2, 2))


@pytest.mark.parametrize("size", [(200, 100), (60, 90), (1, 400)])
def test_prepares_to_the_longest_side(size: tuple[int, int]) -> None:
    adapter = TorchvisionAdapter(tiny("faster_rcnn").detector, longest_side=160)
    tensor, transform = adapter.prepare(noise(size)[0])
    assert max(tensor.shape[1:]) == 160
    assert 0 <= tensor.min() <= tensor.max() <= 1
    corner = transform.to_network(torch.tensor([[0.0, 0, size[1], size[0]]]))
    torch.testing.assert_close(corner, torch.tensor([[0.0, 0, tensor.shape[2], tensor.shape[1]]]))


@pytest.mark.parametrize("size", [(12, 400), (400, 12), (160, 100), (97, 160)])
@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("faster_rcnn", (4, 8)),
        ("retinanet", (4, 8, 16, 32)),
        ("fcos", (4, 8, 16, 32)),
        ("ssd", (4, 8, 16)),
        ("ssdlite", (100 / 25, 100 / 12, 100 / 6)),
    ],
)
def test_strides_whatever_the_shape(name: str, strides: tuple[float, ...], size: tuple[int, int]) -> None:
    """A panorama is padded to several times its short side, which therefore says little about the stride."""
    adapter = tiny(name)
    features, _, _ = adapter.extract([adapter.prepare(noise(size)[0])[0]])
    assert features.strides == strides


@pytest.mark.parametrize(
    ("build", "strides"),
    [
        (detection.retinanet_resnet50_fpn_v2, (8, 16, 32, 64, 128)),
        (detection.fcos_resnet50_fpn, (8, 16, 32, 64, 128)),
        (detection.fasterrcnn_mobilenet_v3_large_320_fpn, (32, 32)),
        (detection.ssd300_vgg16, (8, 16, 32, 64, 100, 300)),
        (detection.ssdlite320_mobilenet_v3_large, (16, 32, 64, 320 / 3, 160, 320)),
    ],
)
def test_strides_of_torchvisions_own_models(build: Any, strides: tuple[float, ...]) -> None:
    """Of 150 x 150 pixels, padded to 160, a pyramid's coarsest maps are of 5, 3 and 2 cells."""
    sizes = {} if "ssd" in build.__name__ else {"min_size": 150, "max_size": 150}
    adapter = TorchvisionAdapter(build(weights=None, weights_backbone=None, **sizes).eval())
    features, _, _ = adapter.extract([torch.rand(3, 90, 90)])
    assert features.strides == strides


@pytest.mark.parametrize("name", DENSE)
def test_candidates_are_what_the_head_predicts_above_the_threshold(name: str) -> None:
    """Their scores, counted again from the head's own output: the best of each level, for SSD of each class."""
    case = tiny_case(name)
    detector, calls = case.adapter.detector, []
    with detector.head.register_forward_hook(lambda head, maps, outputs: calls.append((maps[0], outputs))):
        case.own()
    ((maps, outputs),) = calls
    logits = outputs["cls_logits"]
    if name in ("ssd", "ssdlite"):
        pools = [[(rows.softmax(-1)[:, label]) for label in range(1, logits.shape[-1])] for rows in logits]
    else:
        scores = logits.sigmoid()
        if name == "fcos":
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        cells = [level.shape[2] * level.shape[3] for level in maps]
        anchors = logits.shape[1] // sum(cells)
        pools = [rows.split([count * anchors for count in cells]) for rows in scores]
    _, candidates, _ = case.adapter.extract(case.images)
    limit = detector.topk_candidates
    for image, pool in zip(candidates, pools, strict=True):
        passed = [values[values > detector.score_thresh].sort(descending=True).values for values in pool]
        assert any(len(values) > limit for values in passed), "a limit that does not bind proves nothing"
        expected = torch.cat([values[:limit] for values in passed]).sort(descending=True).values
        assert torch.equal(image.scores, expected)


@pytest.mark.parametrize("name", DENSE)
def test_a_twin_that_trains_is_the_detector_that_trains(name: str) -> None:
    """What the twin is given takes the place of the suppression, and of nothing else."""
    detector = tiny(name).detector.train()

    def refuse(*args: Any) -> Any:
        raise AssertionError("training suppresses nothing")

    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 50]]), "labels": torch.tensor([1])}]
    losses: list[dict[str, Tensor]] = []
    for model in (detector, TorchvisionAdapter(detector).twin(refuse)):
        losses.append(model([torch.ones(3, 96, 96) / 2], targets))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])


# --- by name ---------------------------------------------------------------------------------------------------------

OF_THE_REGISTRY = [
    "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn",
]  # fmt: skip


def own(name: str, num_classes: int = 5) -> nn.Module:
    return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=num_classes)


@pytest.mark.parametrize("name", OF_THE_REGISTRY)
def test_weights_of_ones_own_tell_their_classes(name: str, tmp_path: Path) -> None:
    """Whatever a trainer wrapped them in: the detector is the one that was saved, tensor for tensor."""
    detector = own(name)
    state = detector.state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "w.pth")
    adapter = detector_from_spec(f"torchvision:{name}:{tmp_path / 'w.pth'}")
    loaded = adapter.detector.state_dict()
    assert not adapter.training
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_weights_as_safetensors_or_plain(tmp_path: Path) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    state = own(name, 3).state_dict()
    torch.save(state, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    prints = {detector_from_spec(f"torchvision:{name}:{tmp_path / file}").fingerprint() for file in
              ("w.pth", "w.safetensors")}  # fmt: skip
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no such file"),
        ({"weight": torch.ones(2)}, r"are not of torchvision's ssd300_vgg16: .* is missing"),
        ([torch.ones(2)], "are no state_dict"),
        (b"no pickle", "cannot be read"),
        (b"", "cannot be read"),
        ("ssdlite320_mobilenet_v3_large", "are not of torchvision's ssd300_vgg16"),
        ("odd", "for no number of classes"),
        ("cut", "Missing key"),
    ],
)
def test_weights_that_are_none_of_it_are_refused(content: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    if content == "odd":
        content = own("ssd300_vgg16").state_dict()
        content["head.classification_head.module_list.0.weight"] = torch.ones(
            24, 512, 3, 3
        )  # of six classes, the others of five
    elif content == "cut":
        content = own("ssd300_vgg16").state_dict()
        del content["backbone.scale_weight"]
    elif isinstance(content, str):
        content = own(content).state_dict()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(DataError, match=match):
        detector_from_spec(f"torchvision:ssd300_vgg16:{path}")


def test_without_a_connection_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"fetch https://\S+\.pth elsewhere and save it as \S+\.pth\. For weights of"):
        detector_from_spec("torchvision:ssdlite320_mobilenet_v3_large")
    with pytest.raises(DataError, match=r"fasterrcn"):
        detector_from_spec("torchvision:fasterrcn")
