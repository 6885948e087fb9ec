"""The IoU head: what it predicts from, what it keeps on disk, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from iou_refiner.checks import DataError
from iou_refiner.head import iou_head as predictor_module
from iou_refiner.head.checkpoint import read_metadata
from iou_refiner.head.iou_head import IoUPredictor, fingerprint
from iou_refiner.structures import FeatureMaps

CHANNELS, STRIDES = (3, 5), (8.0, 16.0)


def make_head(**settings: Any) -> IoUPredictor:
    """A small head whose output is not near zero, as that of a fresh one is."""
    head = IoUPredictor(CHANNELS, STRIDES, **{"width": 4, "hidden": [16], "output_size": 3, **settings})
    nn.init.normal_(head.output.weight)
    nn.init.normal_(head.output.bias)
    return head


def make_features(images: int = 2) -> FeatureMaps:
    generator = torch.Generator().manual_seed(1)
    levels = [
        torch.randn(images, c, 512 // int(s), 512 // int(s), generator=generator)
        for c, s in zip(CHANNELS, STRIDES, strict=True)
    ]
    return FeatureMaps(tuple(levels), STRIDES, ((512, 512),) * images)


def make_boxes(count: int = 9) -> tuple[Tensor, Tensor]:
    corner = torch.rand(count, 2) * 200
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 250], 1), torch.arange(count) % 2


# ---- Prediction. ----


@pytest.mark.parametrize("settings", [{}, {"levels": 1}, {"aligned": False}, {"hidden": []}, {"num_classes": 3}])
def test_a_box_is_predicted_as_it_would_be_alone(settings: dict[str, Any]) -> None:
    head, (boxes, image) = make_head(**settings), make_boxes()
    labels = torch.arange(9) % 3
    pyramid = head.encode(make_features())
    together = head(pyramid, boxes, image, labels)
    assert together.shape == (9,)
    assert together.dtype == torch.float32
    assert together.std() > 0
    for row in range(9):
        alone = head(pyramid, boxes[row : row + 1], image[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])
    shuffled = torch.randperm(9)
    torch.testing.assert_close(head(pyramid, boxes[shuffled], image[shuffled], labels[shuffled]), together[shuffled])


@pytest.mark.parametrize("settings", [{}, {"levels": 1}, {"num_classes": 3}])
def test_no_boxes_give_no_predictions(settings: dict[str, Any]) -> None:
    head, none = make_head(**settings), torch.zeros(0, dtype=torch.int64)
    pyramid = head.encode(make_features())
    assert head(pyramid, torch.zeros(0, 4), none, none).shape == (0,)
    assert [part.shape for part in head.judge(pyramid, torch.zeros(0, 4), none, none)] == [(0,), (0,)]
    assert head.encode(make_features(0)).num_images == 0


@pytest.mark.parametrize("order", [False, True])
def test_judging_gives_iou_and_worth_and_in_pieces_the_same(order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head, (boxes, image), labels = make_head(num_classes=2, order=order), make_boxes(10), torch.arange(10) % 2
    pyramid = head.encode(make_features())
    ious, worths = head.judge(pyramid, boxes, image, labels)
    assert not ious.requires_grad
    assert not worths.requires_grad
    torch.testing.assert_close(ious, head.iou(head(pyramid, boxes, image, labels)).detach())
    torch.testing.assert_close(worths, head.worth(pyramid, boxes, image, labels).detach())
    assert torch.equal(ious, worths) is not order
    assert torch.equal(head.predict(pyramid, boxes, image, labels), ious)
    monkeypatch.setattr(predictor_module, "_CHUNK_BOXES", 3)
    for whole, pieces in zip((ious, worths), head.judge(pyramid, boxes, image, labels), strict=True):
        torch.testing.assert_close(pieces, whole)


def test_the_worth_of_a_box_can_be_climbed_at_a_level_that_is_held() -> None:
    head = make_head(levels=1)
    pyramid, image = head.encode(make_features(1)), torch.zeros(1, dtype=torch.int64)
    grown = torch.tensor([[100.0, 100, 325, 325]], requires_grad=True)
    held, free = (head.worth(pyramid, grown, image, level=level) for level in (torch.tensor([0]), None))
    assert not torch.isclose(held, free)
    (slope,) = torch.autograd.grad(held.sum(), grown)
    assert slope.abs().min() > 0


def test_a_head_without_an_output_says_which() -> None:
    head, (boxes, image) = make_head(order=False, regress=False), make_boxes(2)
    pyramid = head.encode(make_features())
    read = head.read(pyramid, boxes, image)
    with pytest.raises(ValueError, match=r"has no energy\. Make one with `order=True`"):
        head.energy_of(read)
    with pytest.raises(ValueError, match=r"only predicts the IoU\. Make one with `regress=True`"):
        head.way_of(read)


def test_a_class_aware_head_answers_for_the_class_asked() -> None:
    head, (boxes, image) = make_head(num_classes=3), make_boxes(6)
    pyramid = head.encode(make_features())
    by_class = torch.stack([head(pyramid, boxes, image, torch.full((6,), c)) for c in range(3)], 1)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    torch.testing.assert_close(head(pyramid, boxes, image, labels), by_class[torch.arange(6), labels])
    assert (by_class[:, 0] != by_class[:, 1]).all()
    with pytest.raises(ValueError, match="`labels` must be given: this head predicts one IoU per class"):
        head(pyramid, boxes, image)


def test_what_is_not_finite_is_nan_and_alone() -> None:
    head, (boxes, image) = make_head(), make_boxes(4)
    features = make_features()
    clean = torch.stack(head.judge(head.encode(features), boxes, image))
    boxes[1, 2] = torch.inf
    spoilt = torch.stack(head.judge(head.encode(features), boxes, image))
    assert torch.isnan(spoilt).tolist() == [[False, True, False, False]] * 2
    torch.testing.assert_close(spoilt[:, [0, 2, 3]], clean[:, [0, 2, 3]])
    features.levels[0][1] = torch.nan
    spoilt = torch.stack(head.judge(head.encode(features), boxes, image))
    assert torch.isnan(spoilt).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize(
    ("objective", "raw", "iou"),
    [
        ("bce", [-100.0, 0.0, 1.0986123, 100.0], [0.0, 0.5, 0.75, 1.0]),
        ("smooth_l1", [-3.0, -1.0, 0.5, 1.0, 2.0], [0.0, 0.0, 0.75, 1.0, 1.0]),
    ],
)
def test_the_objective_says_how_the_output_reads(objective: str, raw: list[float], iou: list[float]) -> None:
    head = make_head(objective=objective)
    torch.testing.assert_close(head.iou(torch.tensor(raw)), torch.tensor(iou))
    assert torch.isnan(head.iou(torch.tensor(torch.nan)))


def across_the_border(levels: int) -> Tensor:
    """Change of the predictions of ten heads (10,) where a growing box is handed from the fine level to the coarse
    (224 px)."""
    features, image = make_features(1), torch.zeros(2, dtype=torch.int64)
    boxes = torch.tensor([[100.0, 100, 323.99, 323.99], [100.0, 100, 324.01, 324.01]])
    heads = [make_head(levels=levels) for _ in range(10)]
    return torch.cat([head(head.encode(features), boxes, image).diff().abs() for head in heads])


def test_reading_all_levels_leaves_no_level_to_jump_between() -> None:
    assert across_the_border(2).max() < 2e-3
    assert across_the_border(1).mean() > 2e-2


def test_the_level_may_be_fixed_before_the_box_moves() -> None:
    head = make_head(levels=1)
    pyramid, image = head.encode(make_features(1)), torch.zeros(1, dtype=torch.int64)
    small, grown = torch.tensor([[100.0, 100, 323, 323]]), torch.tensor([[100.0, 100, 325, 325]])
    level = head.finest_level(small)
    assert level.tolist() == [0]
    kept, free = head(pyramid, grown, image, level=level), head(pyramid, grown, image)
    assert not torch.isclose(kept, free)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_gradient_to_the_boxes(levels: int) -> None:
    head = make_head(levels=levels).double()
    features = make_features()
    features = FeatureMaps(tuple(level.double() for level in features.levels), STRIDES, features.image_sizes)
    pyramid, (boxes, image) = head.encode(features), make_boxes(3)
    point = boxes.double().requires_grad_()

    def raw(at: Tensor) -> Tensor:  # forward() rounds to float32, which would drown the differences
        return head.output(head.read(pyramid, at, image))[:, 0]

    torch.testing.assert_close(head(pyramid, point, image), raw(point).float())
    (slope,) = torch.autograd.grad(raw(point).sum(), point)
    for edge in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[edge] = 1e-5
        with torch.no_grad():
            difference = (raw(point + step) - raw(point - step)) / 2e-5
        torch.testing.assert_close(difference, slope[:, edge], rtol=1e-5, atol=1e-8)


def test_context_widens_the_box_about_its_centre() -> None:
    wide, (boxes, image) = make_head(context=2.0), make_boxes(4)
    plain = make_head(context=1.0)
    plain.load_state_dict(wide.state_dict())
    features = make_features()
    x1, y1, x2, y2 = boxes.unbind(1)
    doubled = torch.stack([x1 - (x2 - x1) / 2, y1 - (y2 - y1) / 2, x2 + (x2 - x1) / 2, y2 + (y2 - y1) / 2], 1)
    found = wide(wide.encode(features), boxes, image)
    torch.testing.assert_close(found, plain(plain.encode(features), doubled, image), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(found, plain(plain.encode(features), boxes, image)).any()


def test_a_head_without_narrowing_pools_the_maps_themselves() -> None:
    head = IoUPredictor([4, 4], STRIDES, width=0, hidden=[8])
    assert sum(p.numel() for p in head.narrow.parameters()) == 0
    levels = (torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4))
    pyramid = head.encode(FeatureMaps(levels, STRIDES, ((64, 64),)))
    torch.testing.assert_close(pyramid.table[:64], levels[0][0].flatten(1).t())


def test_a_fresh_head_is_undecided() -> None:
    head, (boxes, image) = IoUPredictor(CHANNELS, STRIDES), make_boxes()
    raw = head(head.encode(make_features()), boxes, image)
    assert raw.abs().max() < 0.2


def test_features_of_another_shape_are_refused() -> None:
    features = make_features()
    with pytest.raises(
        ValueError,
        match=r"made for 2 levels of \(5, 5\) channels at strides \(8.0, 16.0\); these features have \(3, 5\) channels",
    ):
        IoUPredictor([5, 5], STRIDES).encode(features)
    with pytest.raises(ValueError, match=r"at strides \(4.0, 8.0\); these .* at strides \(8.0, 16.0\)"):
        IoUPredictor(CHANNELS, [4, 8]).encode(features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0.0}, "`context` must be a finite number above 0"),
        ({"levels": 0}, "`levels` must be a finite number above 0"),
        ({"objective": "smooth_l2"}, "Did you mean 'smooth_l1'"),
        ({"output_size": 0}, "`output_size` must be a finite number above 0"),
        ({"strides": [8]}, "one entry per level, got 2, 1"),
        ({"channels": [], "strides": []}, "one entry per level, got 0, 0"),
        ({"width": 0}, r"needs equal channels, got \(3, 5\)"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IoUPredictor(**{"channels": CHANNELS, "strides": STRIDES, **settings})


# ---- On disk. ----

SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_classes": 4, "levels": 1, "aligned": False, "objective": "smooth_l1", "order": False, "detector": "abc"},
    {"hidden": [], "output_size": 5},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_was_saved_is_loaded(tmp_path: Path, settings: dict[str, Any]) -> None:
    head, path = make_head(**settings), tmp_path / "head.safetensors"
    head.save(path, note="on purpose")
    loaded = IoUPredictor.load(path)
    assert fingerprint(loaded) == fingerprint(head)
    assert loaded._settings() == head._settings()
    assert not loaded.training
    assert read_metadata(path)["note"] == "on purpose"
    boxes, image = make_boxes()
    labels = torch.zeros(9, dtype=torch.int64)
    features = make_features()
    assert torch.equal(
        head.predict(head.encode(features), boxes, image, labels),
        loaded.predict(loaded.encode(features), boxes, image, labels),
    )
    before = path.read_bytes()
    loaded.save(path, note="on purpose")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "head.safetensors"
    make_head().save(path)
    before = path.read_bytes()

    def full(*_: object) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        make_head().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_head_gives_the_same_bytes(tmp_path: Path) -> None:
    head = make_head()
    files = {name: tmp_path / name for name in ("a", "b", "c")}
    for path in files.values():
        head.save(path, metrics={"pearson": 0.5}, training=[1, 2], note="x")
    assert len({path.read_bytes() for path in files.values()}) == 1
    assert read_metadata(files["a"])["metrics"] == {"pearson": 0.5}


@pytest.mark.parametrize("name", ["format", "settings"])
def test_a_note_cannot_take_the_place_of_what_the_file_needs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`notes` may not be called {name}"):
        make_head().save(tmp_path / "head.safetensors", **{name: "mine"})
    assert not list(tmp_path.iterdir())


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.safetensors: no such file. Train a head with: iou-refiner train"):
        IoUPredictor.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a head", b"\xff" * 64, "truncated"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "head.safetensors"
    make_head().save(path)
    path.write_bytes(path.read_bytes()[:-7] if isinstance(content, str) else content)
    with pytest.raises(DataError, match=r"head.safetensors: not a readable safetensors file"):
        IoUPredictor.load(path)


def test_a_folder_is_no_head(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable safetensors file"):
        IoUPredictor.load(tmp_path)


def written_by_hand(path: Path, about: Any, weights: dict[str, Tensor]) -> None:
    path.write_bytes(
        safetensors.torch.save(weights, {"iou_refiner": about if isinstance(about, str) else json.dumps(about)})
    )


FOREIGN = [{"format": "iou-refiner head 0"}, {"format": "pt"}, {}, []]


@pytest.mark.parametrize("about", FOREIGN)
def test_a_foreign_file_is_named(tmp_path: Path, about: Any) -> None:
    path = tmp_path / "other.safetensors"
    written_by_hand(path, about, {"weight": torch.zeros(2)})
    with pytest.raises(
        DataError, match=r"not a head of this version \(format (None|'.*'), need 'iou-refiner head 4'\)"
    ):
        IoUPredictor.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_safetensors_file_of_another_program_is_named(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}, metadata))
    with pytest.raises(DataError, match=r"other.safetensors: not a head of this version"):
        IoUPredictor.load(path)


def test_metadata_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    written_by_hand(path, "{", {"weight": torch.zeros(2)})
    with pytest.raises(DataError, match=r"head.safetensors: not a readable"):
        IoUPredictor.load(path)


BROKEN_SETTINGS: list[dict[str, Any]] = [
    {"hidden": [99]},
    {"colour": "red"},
    {"levels": 0},
    {"levels": "some"},
    {"channels": None},
    {"context": -1},
]


@pytest.mark.parametrize("change", BROKEN_SETTINGS)
def test_settings_that_do_not_fit_the_weights_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path, head = tmp_path / "head.safetensors", make_head()
    about = {"format": "iou-refiner head 4", "settings": {**head._settings(), **change}}
    written_by_hand(path, about, dict(head.state_dict()))
    with pytest.raises(DataError, match=r"head.safetensors: settings and weights do not make a head"):
        IoUPredictor.load(path)


@pytest.mark.parametrize("about", [{}, {"settings": []}, {"settings": None}])
def test_a_head_without_settings_is_named(tmp_path: Path, about: dict[str, Any]) -> None:
    path = tmp_path / "head.safetensors"
    written_by_hand(path, {"format": "iou-refiner head 4", **about}, {"weight": torch.zeros(2)})
    with pytest.raises(DataError, match="settings and weights do not make a head"):
        IoUPredictor.load(path)


# ---- The fingerprint. ----


def test_the_fingerprint_changes_with_any_bit_of_the_state() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    seen = {fingerprint(module)}
    assert fingerprint(module) in seen
    with torch.no_grad():
        module[0].weight[3, 2, 0, 0] = torch.nextafter(module[0].weight[3, 2, 0, 0], torch.tensor(torch.inf))
    seen.add(fingerprint(module))
    module[1].running_mean[0] += 1
    seen.add(fingerprint(module))
    module[1].num_batches_tracked += 1
    seen.add(fingerprint(module))
    assert len(seen) == 4


def test_the_fingerprint_sees_names_shapes_and_types() -> None:
    def holding(name: str, tensor: Tensor) -> nn.Module:
        module = nn.Module()
        module.register_buffer(name, tensor)
        return module

    variants = [
        holding("a", torch.zeros(2, 3)),
        holding("b", torch.zeros(2, 3)),
        holding("a", torch.zeros(3, 2)),
        holding("a", torch.zeros(2, 3, dtype=torch.int32)),
        holding("a", torch.zeros(2, 3, dtype=torch.bfloat16)),
        holding("a", torch.zeros(())),
        holding("a", torch.zeros(0)),
        holding("a", torch.zeros(2, dtype=torch.bool)),
        nn.Module(),
    ]
    assert len({fingerprint(module) for module in variants}) == len(variants)


def test_the_fingerprint_ignores_layout_and_mode() -> None:
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = nn.Parameter(one.weight.detach().t().contiguous().t())
    assert not two.weight.is_contiguous()
    assert fingerprint(one) == fingerprint(two.eval().requires_grad_(False))


def test_features_in_half_precision_are_encoded_in_the_precision_of_the_head() -> None:
    torch.manual_seed(0)
    head = IoUPredictor((3,), (8,), width=2, hidden=(4,), output_size=2)
    level = torch.rand(1, 3, 6, 6).half()
    half, full = (head.encode(FeatureMaps((x,), (8,), ((48, 48),))).table for x in (level, level.float()))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
