"""The fingerprint: equal for equal weights and buffers, and for nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iou_refiner.detector.fingerprint import fingerprint


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
