"""What the head is trained to do: laws of the losses, and slow obvious oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from iou_refiner import HeadConfig, IoUHead
from iou_refiner.boxes import encode_boxes
from iou_refiner.training.losses import RANKING_WEIGHT, _log_softmax, deltas_loss, iou_loss, ranking_loss, total_loss
from iou_refiner.training.samples import Samples


def make_head(num_classes: int = 0, **config) -> IoUHead:
    config = HeadConfig(width=2, hidden=(6,), output_size=2, **config)
    return IoUHead((4,), (8,), config, num_classes=num_classes)


def make_samples(iou: list[float], gt_boxes: list[list[float]]) -> Samples:
    boxes = torch.tensor([[10.0, 10, 30, 40]]).repeat(len(iou), 1) + torch.arange(len(iou))[:, None]
    return Samples(boxes, torch.ones(len(iou), dtype=torch.int64), torch.tensor(iou), torch.tensor(gt_boxes))


def test_softmax_within_groups_is_softmax_of_each_group():
    values, group = torch.randn(9), torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 2])
    logs = _log_softmax(values, group)
    for index in range(3):
        torch.testing.assert_close(logs[group == index], values[group == index].log_softmax(0))


def test_the_ranking_is_right_at_logits_that_differ_as_the_ious_do_and_wrong_elsewhere():
    first, second = [0.0, 0, 9, 9], [5.0, 5, 9, 9]
    samples = make_samples([0.9, 0.4, 0.7, 0.3, 0.05], [first, first, second, second, second])
    image = torch.zeros(5, dtype=torch.int64)
    # Whatever is added to the logits around one object, and whatever the logit of a box that means none.
    right = samples.iou / 0.1 + torch.tensor([3.0, 3, -7, -7, 50])
    assert ranking_loss(right, samples, image).item() == pytest.approx(0, abs=1e-5)
    reversed_ = -samples.iou / 0.1
    assert ranking_loss(reversed_, samples, image) > ranking_loss(torch.zeros(5), samples, image) > 0.1


def test_the_ranking_keeps_objects_of_different_images_apart():
    same = [0.0, 0, 9, 9]
    samples = make_samples([0.9, 0.4], [same, same])
    flat = torch.zeros(2)
    assert ranking_loss(flat, samples, torch.tensor([0, 0])) > 0.1
    assert ranking_loss(flat, samples, torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-6)


def test_a_ranking_without_any_box_that_means_an_object_is_zero_and_has_a_gradient():
    logits = torch.zeros(2, requires_grad=True)
    ranking_loss(logits, make_samples([0.05, 0.0], [[0.0, 0, 9, 9]] * 2), torch.zeros(2, dtype=torch.int64)).backward()
    assert logits.grad.tolist() == [0, 0]


def test_deltas_are_learned_only_where_a_box_means_an_object():
    samples = make_samples([0.8, 0.1], [[12.0, 12, 33, 44], [100.0, 100, 200, 200]])
    deltas = encode_boxes(samples.gt_boxes, samples.boxes).requires_grad_()
    loss = deltas_loss(deltas * torch.tensor([[1.0], [7.0]]), samples)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(deltas_loss(deltas + 0.3, samples), deltas)
    assert (gradient[0] > 0).all()
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("ranking", [False, True])
@pytest.mark.parametrize("deltas", [False, True])
def test_every_output_learns_from_the_total(ranking, deltas):
    head = make_head(ranking=ranking, deltas=deltas)
    samples = make_samples([0.8, 0.5, 0.2], [[12.0, 12, 33, 44]] * 3)
    total_loss(head, torch.randn(3, 6), samples, torch.zeros(3, dtype=torch.int64)).backward()
    learned = {name for name, weight in head.named_parameters() if weight.grad is not None and weight.grad.abs().sum()}
    expected = {"iou_output"} | ({"ranking_output"} if ranking else set()) | ({"deltas_output"} if deltas else set())
    assert {name.partition(".")[0] for name in learned} == expected


def test_a_class_aware_head_learns_for_the_class_of_the_box_alone():
    head = make_head(num_classes=3)
    samples = replace(make_samples([0.8, 0.5, 0.2], [[12.0, 12, 33, 44]] * 3), labels=torch.tensor([1, 1, 1]))
    total_loss(head, torch.randn(3, 6), samples, torch.zeros(3, dtype=torch.int64)).backward()
    for output in (head.iou_output, head.ranking_output, head.deltas_output):
        learned = output.weight.grad.unflatten(0, (3, -1)).abs().sum((1, 2))
        assert learned.gt(0).tolist() == [False, True, False]


def test_the_iou_is_learned_from_boxes_that_mean_an_object_alone():
    head = make_head(ranking=False, deltas=False)
    embedding = torch.randn(3, 6, requires_grad=True)
    total_loss(head, embedding, make_samples([0.8, 0.2, 0.4], [[12.0, 12, 33, 44]] * 3), torch.zeros(3)).backward()
    assert embedding.grad.abs().sum(1).gt(0).tolist() == [True, False, True]


def test_a_batch_without_any_box_that_means_an_object_costs_nothing_and_has_a_gradient():
    head = make_head()
    embedding = torch.randn(2, 6, requires_grad=True)
    loss = total_loss(
        head, embedding, make_samples([0.05, 0.0], [[0.0, 0, 9, 9]] * 2), torch.zeros(2, dtype=torch.int64)
    )
    loss.backward()
    assert loss.item() == 0
    assert embedding.grad.abs().sum() == 0


def test_the_iou_loss_is_smallest_at_the_true_iou():
    iou = torch.tensor([0.1, 0.5, 0.75])
    for objective, right in (("bce", iou.logit()), ("smooth_l1", 2 * iou - 1)):
        head = make_head(objective=objective)
        torch.testing.assert_close(head.to_iou(right), iou)
        best = iou_loss(head, right, iou)
        for step in (-0.2, 0.2):
            assert iou_loss(head, right + step, iou) > best


def test_the_total_is_the_sum_of_its_parts():
    head, embedding, image = make_head(), torch.randn(3, 6), torch.zeros(3, dtype=torch.int64)
    samples = make_samples([0.8, 0.5, 0.2], [[12.0, 12, 33, 44]] * 3)
    rows = torch.tensor([0, 1])  # those that mean an object
    expected = iou_loss(head, head.iou_logits(embedding[rows]), samples.iou[rows])
    expected = expected + RANKING_WEIGHT * ranking_loss(head.ranking_logits(embedding), samples, image)
    expected = expected + deltas_loss(head.deltas(embedding), samples)
    torch.testing.assert_close(total_loss(head, embedding, samples, image), expected)


def test_the_ranking_may_be_learned_from_another_target():
    samples, image = make_samples([0.9, 0.4, 0.7], [[0.0, 0, 9, 9]] * 3), torch.zeros(3, dtype=torch.int64)
    target = torch.tensor([1.0, 5.0, 2.0])
    assert ranking_loss(target - 4, samples, image, target).item() == pytest.approx(0, abs=1e-6)
    assert ranking_loss(samples.iou / 0.1, samples, image, target) > 0.1
