"""What the head is trained to do: laws of the losses, and slow obvious oracles."""

from __future__ import annotations

import pytest
import torch

from iou_refiner import IoUPredictor
from iou_refiner.boxes import encode_boxes
from iou_refiner.training.losses import _log_softmax, order_loss, total_loss, way_loss
from iou_refiner.training.samples import Samples


def samples(iou: list[float], objects: list[list[float]]) -> Samples:
    boxes = torch.tensor([[10.0, 10, 30, 40]]).repeat(len(iou), 1) + torch.arange(len(iou))[:, None]
    return Samples(boxes, torch.ones(len(iou), dtype=torch.int64), torch.tensor(iou), torch.tensor(objects))


def test_softmax_within_groups_is_softmax_of_each_group():
    values, group = torch.randn(9), torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 2])
    found = _log_softmax(values, group)
    for index in range(3):
        torch.testing.assert_close(found[group == index], values[group == index].log_softmax(0))


def test_order_is_right_at_energies_that_differ_as_the_ious_do_and_wrong_elsewhere():
    first, second = [0.0, 0, 9, 9], [5.0, 5, 9, 9]
    asked = samples([0.9, 0.4, 0.7, 0.3, 0.05], [first, first, second, second, second])
    image = torch.zeros(5, dtype=torch.int64)
    # Whatever is added to the energies around one object, and whatever the energy of a box that means none.
    right = asked.iou / 0.1 + torch.tensor([3.0, 3, -7, -7, 50])
    assert order_loss(right, asked, image).item() == pytest.approx(0, abs=1e-5)
    reversed_ = -asked.iou / 0.1
    assert order_loss(reversed_, asked, image) > order_loss(torch.zeros(5), asked, image) > 0.1


def test_order_keeps_objects_of_different_images_apart():
    same = [0.0, 0, 9, 9]
    asked = samples([0.9, 0.4], [same, same])
    flat = torch.zeros(2)
    assert order_loss(flat, asked, torch.tensor([0, 0])) > 0.1
    assert order_loss(flat, asked, torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-6)


def test_order_without_any_box_that_means_an_object_is_zero_and_has_a_gradient():
    energy = torch.zeros(2, requires_grad=True)
    order_loss(energy, samples([0.05, 0.0], [[0.0, 0, 9, 9]] * 2), torch.zeros(2, dtype=torch.int64)).backward()
    assert energy.grad.tolist() == [0, 0]


def test_way_is_judged_only_where_a_box_means_an_object():
    asked = samples([0.8, 0.1], [[12.0, 12, 33, 44], [100.0, 100, 200, 200]])
    way = encode_boxes(asked.objects, asked.boxes).requires_grad_()
    loss = way_loss(way * torch.tensor([[1.0], [7.0]]), asked)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    (way_gradient,) = torch.autograd.grad(way_loss(way + 0.3, asked), way)
    assert (way_gradient[0] > 0).all()
    assert (way_gradient[1] == 0).all()


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("regress", [False, True])
def test_every_output_learns_from_the_total(order, regress):
    head = IoUPredictor((4,), (8,), width=2, hidden=(6,), output_size=2, order=order, regress=regress)
    asked = samples([0.8, 0.5, 0.2], [[12.0, 12, 33, 44]] * 3)
    total_loss(head, torch.randn(3, 6), asked, torch.zeros(3, dtype=torch.int64)).backward()
    learned = {name for name, weight in head.named_parameters() if weight.grad is not None and weight.grad.abs().sum()}
    expected = {"output"} | ({"energy"} if order else set()) | ({"delta"} if regress else set())
    assert {name.partition(".")[0] for name in learned} == expected


def test_the_iou_is_learned_from_boxes_that_mean_an_object_alone():
    head = IoUPredictor((4,), (8,), width=2, hidden=(6,), output_size=2, order=False, regress=False)
    read = torch.randn(3, 6, requires_grad=True)
    total_loss(head, read, samples([0.8, 0.2, 0.4], [[12.0, 12, 33, 44]] * 3), torch.zeros(3)).backward()
    assert read.grad.abs().sum(1).gt(0).tolist() == [True, False, True]


def test_a_batch_without_any_box_that_means_an_object_costs_nothing_and_has_a_gradient():
    head = IoUPredictor((4,), (8,), width=2, hidden=(6,), output_size=2)
    read = torch.randn(2, 6, requires_grad=True)
    loss = total_loss(head, read, samples([0.05, 0.0], [[0.0, 0, 9, 9]] * 2), torch.zeros(2, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert read.grad.abs().sum() == 0
