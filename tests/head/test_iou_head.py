"""The IoU head: what it predicts from, and how it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iou_refiner.head import iou_head
from iou_refiner.head.config import HeadConfig
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.structures import FeatureMaps
from tests.kit.heads import CHANNELS, STRIDES, iou_logits, make_boxes, make_features, make_head


@pytest.mark.parametrize("config", [{}, {"levels": 1}, {"aligned": False}, {"hidden": ()}, {"num_classes": 3}])
def test_a_box_is_predicted_as_it_would_be_alone(config: dict[str, Any]) -> None:
    head, (boxes, image) = make_head(**config), make_boxes()
    labels = torch.arange(9) % 3
    table = head.encode(make_features())

    def outputs(rows: Tensor) -> Tensor:
        some = table, boxes[rows], image[rows], labels[rows]
        return torch.stack([iou_logits(head, *some), *head(*some)])

    together = outputs(torch.arange(9))
    assert together.shape == (3, 9)
    assert together.dtype == torch.float32
    assert (together.std(1) > 0).all()
    for row in range(9):
        torch.testing.assert_close(outputs(torch.tensor([row]))[:, 0], together[:, row])
    shuffled = torch.randperm(9)
    torch.testing.assert_close(outputs(shuffled), together[:, shuffled])


@pytest.mark.parametrize("config", [{}, {"levels": 1}, {"num_classes": 3}])
def test_no_boxes_give_no_predictions(config: dict[str, Any]) -> None:
    head, none = make_head(**config), torch.zeros(0, dtype=torch.int64)
    table = head.encode(make_features())
    for predict in (head, head.predict):
        assert [part.shape for part in predict(table, torch.zeros(0, 4), none, none)] == [(0,), (0,)]
    assert head.regress(table, torch.zeros(0, 4), none, none).shape == (0, 4)
    assert head.encode(make_features(0)).num_images == 0


@pytest.mark.parametrize("ranking", [False, True])
def test_predicting_is_the_forward_pass_without_gradients_and_in_pieces_the_same(
    ranking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, (boxes, image), labels = make_head(num_classes=2, ranking=ranking), make_boxes(10), torch.arange(10) % 2
    table = head.encode(make_features())
    prediction, expected = head.predict(table, boxes, image, labels), head(table, boxes, image, labels)
    for part, differentiable in zip(prediction, expected, strict=True):
        assert not part.requires_grad
        assert differentiable.requires_grad
        torch.testing.assert_close(part, differentiable.detach())
        assert ((part >= 0) & (part <= 1)).all()
    assert torch.equal(prediction.iou, prediction.ranking) is not ranking
    moved = head.regress(table, boxes, image, labels)
    monkeypatch.setattr(iou_head, "_CHUNK_BOXES", 3)
    for whole, pieces in zip(prediction, head.predict(table, boxes, image, labels), strict=True):
        torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(head.regress(table, boxes, image, labels), moved)


def test_the_outputs_are_what_the_logits_say() -> None:
    head, (boxes, image) = make_head(), make_boxes()
    table = head.encode(make_features())
    embedding = head.roi_embedding(table, boxes, image)
    prediction = head(table, boxes, image)
    torch.testing.assert_close(prediction.iou, head.iou_logits(embedding).sigmoid())
    torch.testing.assert_close(prediction.ranking, head.ranking_logits(embedding).sigmoid())
    # The deltas are shifts of the centre over the size, and logs of the factors on the size.
    dx, dy, dw, dh = head.deltas(embedding).unbind(1)
    x1, y1, x2, y2 = boxes.unbind(1)
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height
    width, height = width * dw.exp(), height * dh.exp()
    expected = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
    torch.testing.assert_close(head.regress(table, boxes, image), expected)
    assert not torch.isclose(expected, boxes).all(1).any()


def test_the_ranking_of_a_box_can_be_climbed_at_a_level_that_is_held() -> None:
    head = make_head(levels=1)
    table, image = head.encode(make_features(1)), torch.zeros(1, dtype=torch.int64)
    grown = torch.tensor([[100.0, 100, 325, 325]], requires_grad=True)
    held, free = (head(table, grown, image, level=level).ranking for level in (torch.tensor([0]), None))
    assert not torch.isclose(held, free)
    (slope,) = torch.autograd.grad(held.sum(), grown)
    assert slope.abs().min() > 0


def test_a_head_without_an_output_says_which() -> None:
    head, (boxes, image) = make_head(ranking=False, deltas=False), make_boxes(2)
    table = head.encode(make_features())
    embedding = head.roi_embedding(table, boxes, image)
    with pytest.raises(ValueError, match=r"has no ranking\. Make one with `ranking=True`"):
        head.ranking_logits(embedding)
    with pytest.raises(ValueError, match=r"only predicts the IoU\. Make one with `deltas=True`"):
        head.deltas(embedding)


def test_a_class_aware_head_predicts_for_the_class_given() -> None:
    head, (boxes, image) = make_head(num_classes=3), make_boxes(6)
    table = head.encode(make_features())
    by_class = torch.stack([iou_logits(head, table, boxes, image, torch.full((6,), c)) for c in range(3)], 1)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    expected = by_class[torch.arange(6), labels]
    torch.testing.assert_close(iou_logits(head, table, boxes, image, labels), expected)
    torch.testing.assert_close(head(table, boxes, image, labels).iou, expected.sigmoid())
    assert (by_class[:, 0] != by_class[:, 1]).all()
    with pytest.raises(ValueError, match="`labels` must be given: this head predicts one IoU per class"):
        head(table, boxes, image)


def test_a_class_aware_head_is_for_each_class_the_head_with_the_outputs_of_that_class() -> None:
    aware, (boxes, image) = make_head(num_classes=3), make_boxes(6)
    table = aware.encode(make_features())
    for number in range(3):
        labels = torch.full((6,), number)
        alone = make_head()
        alone.load_state_dict(
            {
                name: tensor.unflatten(0, (3, -1))[number] if "_output." in name else tensor
                for name, tensor in aware.state_dict().items()
            }
        )
        for one, other in zip(aware(table, boxes, image, labels), alone(table, boxes, image), strict=True):
            torch.testing.assert_close(one, other)
        moved = aware.regress(table, boxes, image, labels)
        torch.testing.assert_close(moved, alone.regress(table, boxes, image))
        assert not torch.isclose(moved, aware.regress(table, boxes, image, (labels + 1) % 3)).all(1).any()
    embedding = aware.roi_embedding(table, boxes, image)
    for output in (aware.iou_logits, aware.ranking_logits, aware.deltas):
        with pytest.raises(ValueError, match="`labels` must be given"):
            output(embedding)


def test_what_is_not_finite_is_nan_and_alone() -> None:
    head, (boxes, image) = make_head(), make_boxes(4)
    features = make_features()
    clean = torch.stack(head.predict(head.encode(features), boxes, image))
    boxes[1, 2] = torch.inf
    spoilt = torch.stack(head.predict(head.encode(features), boxes, image))
    assert torch.isnan(spoilt).tolist() == [[False, True, False, False]] * 2
    torch.testing.assert_close(spoilt[:, [0, 2, 3]], clean[:, [0, 2, 3]])
    features.levels[0][1] = torch.nan
    spoilt = torch.stack(head.predict(head.encode(features), boxes, image))
    assert torch.isnan(spoilt).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize(
    ("objective", "logits", "iou"),
    [
        ("bce", [-100.0, 0.0, 1.0986123, 100.0], [0.0, 0.5, 0.75, 1.0]),
        ("smooth_l1", [-3.0, -1.0, 0.5, 1.0, 2.0], [0.0, 0.0, 0.75, 1.0, 1.0]),
    ],
)
def test_the_objective_says_how_logits_become_an_iou(objective: str, logits: list[float], iou: list[float]) -> None:
    head = make_head(objective=objective)
    torch.testing.assert_close(head.to_iou(torch.tensor(logits)), torch.tensor(iou))
    assert torch.isnan(head.to_iou(torch.tensor(torch.nan)))


def across_the_border(levels: int) -> Tensor:
    """Change of the IoU logits of ten heads (10,) where a growing box is handed from the fine level to the coarse
    (224 px)."""
    features, image = make_features(1), torch.zeros(2, dtype=torch.int64)
    boxes = torch.tensor([[100.0, 100, 323.99, 323.99], [100.0, 100, 324.01, 324.01]])
    heads = [make_head(levels=levels) for _ in range(10)]
    return torch.cat([iou_logits(head, head.encode(features), boxes, image).diff().abs() for head in heads])


def test_pooling_from_all_levels_leaves_no_level_to_jump_between() -> None:
    assert across_the_border(2).max() < 2e-3
    assert across_the_border(1).mean() > 2e-2


def test_the_level_may_be_fixed_before_the_box_moves() -> None:
    head = make_head(levels=1)
    table, image = head.encode(make_features(1)), torch.zeros(1, dtype=torch.int64)
    small, grown = torch.tensor([[100.0, 100, 323, 323]]), torch.tensor([[100.0, 100, 325, 325]])
    level = head.finest_level(small)
    assert level.tolist() == [0]
    held, free = head(table, grown, image, level=level), head(table, grown, image)
    assert not torch.isclose(held.iou, free.iou)
    assert not torch.isclose(held.ranking, free.ranking)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_gradient_to_the_boxes(levels: int) -> None:
    head = make_head(levels=levels).double()
    features = make_features()
    features = FeatureMaps(tuple(level.double() for level in features.levels), STRIDES, features.image_sizes)
    table, (boxes, image) = head.encode(features), make_boxes(3)
    point = boxes.double().requires_grad_()

    def exact(at: Tensor) -> Tensor:  # iou_logits() rounds to float32, which would drown the differences
        return head.iou_output(head.roi_embedding(table, at, image))[:, 0]

    torch.testing.assert_close(iou_logits(head, table, point, image), exact(point).float())
    (slope,) = torch.autograd.grad(exact(point).sum(), point)
    for edge in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[edge] = 1e-5
        with torch.no_grad():
            difference = (exact(point + step) - exact(point - step)) / 2e-5
        torch.testing.assert_close(difference, slope[:, edge], rtol=1e-5, atol=1e-8)


def test_context_widens_the_box_about_its_centre() -> None:
    wide, (boxes, image) = make_head(context=2.0), make_boxes(4)
    plain = make_head(context=1.0)
    plain.load_state_dict(wide.state_dict())
    features = make_features()
    x1, y1, x2, y2 = boxes.unbind(1)
    doubled = torch.stack([x1 - (x2 - x1) / 2, y1 - (y2 - y1) / 2, x2 + (x2 - x1) / 2, y2 + (y2 - y1) / 2], 1)
    logits = iou_logits(wide, wide.encode(features), boxes, image)
    table = plain.encode(features)
    torch.testing.assert_close(logits, iou_logits(plain, table, doubled, image), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(logits, iou_logits(plain, table, boxes, image)).any()


def test_a_head_without_narrowing_pools_the_maps_themselves() -> None:
    head = IoUHead([4, 4], STRIDES, HeadConfig(width=0, hidden=(8,)))
    assert sum(p.numel() for p in head.narrow.parameters()) == 0
    levels = (torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4))
    table = head.encode(FeatureMaps(levels, STRIDES, ((64, 64),)))
    torch.testing.assert_close(table.cells[:64], levels[0][0].flatten(1).t())


def test_a_fresh_head_is_undecided() -> None:
    head, (boxes, image) = IoUHead(CHANNELS, STRIDES), make_boxes()
    embedding = head.roi_embedding(head.encode(make_features()), boxes, image)
    assert head.iou_logits(embedding).abs().max() < 0.2
    assert head.ranking_logits(embedding).abs().max() < 0.2


def test_features_of_another_shape_are_refused() -> None:
    features = make_features()
    with pytest.raises(
        ValueError,
        match=r"made for 2 levels of \(5, 5\) channels at strides \(8.0, 16.0\); these features have \(3, 5\) channels",
    ):
        IoUHead([5, 5], STRIDES).encode(features)
    with pytest.raises(ValueError, match=r"at strides \(4.0, 8.0\); these .* at strides \(8.0, 16.0\)"):
        IoUHead(CHANNELS, [4, 8]).encode(features)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"context": 0.0}, "`context` must be a finite number above 0"),
        ({"levels": 0}, "`levels` must be a finite number above 0"),
        ({"objective": "smooth_l2"}, "Did you mean 'smooth_l1'"),
        ({"output_size": 0}, "`output_size` must be a finite number above 0"),
    ],
)
def test_a_bad_configuration_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [8]}, "one entry per level, got 2, 1"),
        ({"channels": [], "strides": []}, "one entry per level, got 0, 0"),
        ({"config": HeadConfig(width=0)}, r"needs equal channels, got \(3, 5\)"),
    ],
)
def test_levels_that_do_not_suit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IoUHead(**{"channels": CHANNELS, "strides": STRIDES, **change})


def test_parts_of_a_head_that_is_not_there_have_no_weights() -> None:
    names = {name.partition(".")[0] for name in make_head(ranking=False, deltas=False, mix=0).state_dict()}
    assert names == {"narrow", "trunk", "iou_output"}
    names = {name.partition(".")[0] for name in make_head().state_dict()}
    assert names == {"narrow", "trunk", "iou_output", "ranking_output", "deltas_output"}


def test_features_in_half_precision_are_encoded_in_the_precision_of_the_head() -> None:
    head = IoUHead((3,), (8,), HeadConfig(width=2, hidden=(4,), output_size=2))
    level = torch.rand(1, 3, 6, 6).half()
    half, full = (head.encode(FeatureMaps((x,), (8,), ((48, 48),))).cells for x in (level, level.float()))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
