"""The losses of a network over siblings: each against a loop, and no gradient through what is true."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iou_refiner.boxes import decode_boxes
from iou_refiner.siblings.sibling_net import Verdict
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.sibling_losses import deltas_loss, iou_loss, share_loss, sibling_loss
from tests.kit.crowds import LIMIT, SMALL, make_crowd
from tests.kit.reference import box_iou


def cross_entropy(logit: float, truth: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -truth * math.log(p) - (1 - truth) * math.log(1 - p)


def smooth_l1(error: float) -> float:
    return abs(error) - 0.25 if abs(error) > 0.5 else error * error


def deltas_by_loop(deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, iou: Tensor) -> float:
    losses = []
    for row in range(len(boxes)):
        if not iou[row] > 0.5:
            continue
        (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes[row].tolist(), gt_boxes[row].tolist()
        width, height = x2 - x1, y2 - y1
        target = (
            ((u1 + u2) - (x1 + x2)) / 2 / width, ((v1 + v2) - (y1 + y2)) / 2 / height,
            math.log((u2 - u1) / width), math.log((v2 - v1) / height),
        )  # fmt: skip
        stds = (0.1, 0.1, 0.2, 0.2)
        losses.append(sum(smooth_l1((d - t) / s) for d, t, s in zip(deltas[row].tolist(), target, stds, strict=True)))
    return sum(losses) / max(len(losses), 1)


def test_deltas_are_compared_in_their_units_where_a_box_means_an_object() -> None:
    (candidates, targets), deltas = make_crowd(0), 0.1 * torch.randn(36, 4)
    iou, gt_boxes = targets.match(candidates.boxes, candidates.labels)
    assert 5 < (iou > 0.5).sum() < 36
    loss = deltas_loss(deltas, candidates.boxes, gt_boxes, iou)
    assert float(loss) == pytest.approx(deltas_by_loop(deltas, candidates.boxes, gt_boxes, iou), rel=1e-5)
    nobody = deltas_loss(deltas, candidates.boxes, gt_boxes, torch.full_like(iou, torch.nan))
    assert float(nobody) == 0


def test_the_iou_is_learned_where_a_box_means_an_object() -> None:
    logits, iou = torch.randn(9), torch.tensor([0.0, 0.29, 0.31, 0.5, 0.9, 1.0, torch.nan, 0.6, 0.3])
    expected = [cross_entropy(float(v), float(t)) for v, t in zip(logits, iou, strict=True) if t > 0.3]
    assert len(expected) in (5, 6)  # 0.3 in float32 may lie above
    assert float(iou_loss(logits, iou)) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert float(iou_loss(logits, torch.zeros(9))) == 0


def test_the_share_is_learned_where_a_threshold_is_judged() -> None:
    logits, positive = torch.randn(4, 10), (torch.rand(4, 10) < 0.5).float()
    positive[1, 3:] = torch.nan
    expected = [
        cross_entropy(float(v), float(t))
        for v, t in zip(logits.flatten(), positive.flatten(), strict=True)
        if not math.isnan(t)
    ]
    assert len(expected) == 33
    assert float(share_loss(logits, positive)) == pytest.approx(sum(expected), rel=1e-5)
    assert float(share_loss(logits, torch.full((4, 10), torch.nan))) == 0


def samples_of(seed: int, **options: Any) -> ClusterSamples:
    candidates, targets = make_crowd(seed, **options)
    return ClusterSamples.of(candidates, LIMIT, targets, SMALL)


def make_verdict(count: int) -> Verdict:
    generator = torch.Generator().manual_seed(5)
    columns = (torch.randn(count, generator=generator), 0.1 * torch.randn(count, 4, generator=generator))
    return Verdict(*(c.requires_grad_() for c in (*columns, torch.randn(count, 10, generator=generator))))


def positives_by_loop(boxes: Tensor, scores: Tensor, labels: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
    """Each threshold, each detection by falling score: does it take a free object?"""
    positive = torch.zeros(len(boxes), 10)
    for step in range(10):
        free = set(range(len(gt_boxes)))
        for row in scores.argsort(descending=True, stable=True).tolist():
            ious = {o: box_iou(boxes[row].tolist(), gt_boxes[o].tolist()) for o in free if gt_labels[o] == labels[row]}
            best = max(ious, key=lambda o: ious[o], default=None)
            if best is not None and ious[best] >= 0.5 + 0.05 * step:
                positive[row, step] = 1
                free.remove(best)
    return positive


def test_all_of_it_is_of_the_moved_boxes_in_the_order_of_the_networks_scores() -> None:
    images = [samples_of(1), samples_of(2, objects=3)]
    samples = ClusterSamples.concat(images)
    verdict = make_verdict(len(samples.clusters))
    expected, first = [0.0, 0.0, 0.0], 0
    deltas: list[tuple[Tensor, ...]] = []
    moved_iou: list[float] = []
    for image in images:
        rows = slice(first, first + len(image.clusters))
        first += len(image.clusters)
        boxes, labels = image.boxes[image.clusters.survivors], image.labels[image.clusters.survivors]
        (targets,) = image.targets
        moved = decode_boxes(verdict.deltas[rows].detach(), boxes)
        scores = verdict.share_logits[rows].detach().sigmoid().mean(1)
        positive = positives_by_loop(moved, scores, labels, targets.gt_boxes, targets.gt_labels)
        assert 0 < positive.mean() < 1
        pairs = zip(verdict.share_logits[rows].flatten().tolist(), positive.flatten().tolist(), strict=True)
        expected[2] += sum(cross_entropy(logit, truth) for logit, truth in pairs)
        iou, gt_boxes = targets.match(boxes, labels)
        deltas.append((verdict.deltas[rows].detach(), boxes, gt_boxes, iou))
        moved_iou += targets.true_iou(moved, labels).tolist()
    expected[0] = deltas_by_loop(*(torch.cat(column) for column in zip(*deltas, strict=True)))
    fits = [(float(v), t) for v, t in zip(verdict.iou_logits.detach(), moved_iou, strict=True) if t > 0.3]
    expected[1] = sum(cross_entropy(*pair) for pair in fits) / len(fits)
    total = 0.5 * expected[0] + 0.5 * expected[1] + 0.4 * expected[2] / 7  # objects
    assert float(sibling_loss(verdict, samples).detach()) == pytest.approx(total, rel=1e-4)


def test_no_gradient_goes_through_what_is_true() -> None:
    """Moving a box changes what is true of it; but of the deltas only their own loss has a gradient."""
    samples = samples_of(1)
    verdict = make_verdict(len(samples.clusters))
    sibling_loss(verdict, samples).backward()
    rows = samples.clusters.survivors
    iou, gt_boxes = samples.targets[0].match(samples.boxes[rows], samples.labels[rows])
    alone = verdict.deltas.detach().requires_grad_()
    (0.5 * deltas_loss(alone, samples.boxes[rows], gt_boxes, iou)).backward()
    torch.testing.assert_close(verdict.deltas.grad, alone.grad)
    assert verdict.iou_logits.grad is not None
    assert (verdict.iou_logits.grad != 0).any()
    assert verdict.share_logits.grad is not None
    assert (verdict.share_logits.grad != 0).all()


def test_images_without_objects_teach_that_there_is_none() -> None:
    candidates, targets = make_crowd(1)
    empty = replace(targets, gt_boxes=targets.gt_boxes[:0], gt_labels=targets.gt_labels[:0])
    samples = ClusterSamples.of(candidates, LIMIT, empty, SMALL)
    verdict = make_verdict(len(samples.clusters))
    loss, none = sibling_loss(verdict, samples), torch.zeros(len(samples.clusters), 10)
    torch.testing.assert_close(loss, 0.4 * share_loss(verdict.share_logits, none))
    loss.backward()
    assert (verdict.share_logits.grad > 0).all()
