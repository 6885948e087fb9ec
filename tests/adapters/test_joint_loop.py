"""Joint training in a plain loop: what trains the detector trains both, and both are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iou_refiner import DataError, HeadConfig, IoURefiner, SiblingHead
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.training.joint import new_head
from tests.adapters.cases_torchvision import BUILDERS, tiny
from tests.kit import processes

HEAD = HeadConfig(width=8, hidden=(16,))
ADDED = {"loss_iou", "loss_iou_ranking", "loss_iou_deltas"}


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((70, 110), (90, 64))]


def targets() -> list[dict[str, Tensor]]:
    """Two objects in the first image, one in the second."""
    boxes = [torch.tensor([[10.0, 12, 50, 60], [60, 5, 100, 40]]), torch.tensor([[8.0, 20, 50, 80]])]
    return [{"boxes": objects, "labels": torch.arange(1, 1 + len(objects))} for objects in boxes]


def refiner(**options: Any) -> IoURefiner:
    """A tiny Faster R-CNN and an untrained head, both in training mode."""
    adapter = tiny("faster_rcnn")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head = new_head(adapter, images()[:1], HEAD)
    return IoURefiner(adapter, head, **options).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, autocast: bool = False) -> list[float]:
    """A plain loop, as anyone writes it."""
    sums = []
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(images(), targets())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        sums.append(float(sum(float(losses[loss].detach()) for loss in ADDED)))
    return sums


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class TestLoop:
    """Whatever trains the detector trains both."""

    def test_the_head_learns(self) -> None:
        model = refiner()
        sums = train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 30)
        assert sum(sums[-5:]) < 0.8 * sum(sums[:5])

    def test_in_half_precision(self) -> None:
        model = refiner()
        sums = train(model, sgd(model), 20, autocast=True)
        assert sum(sums[-5:]) < sum(sums[:5])
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    def test_kept_and_read_again(self, tmp_path: Path) -> None:
        model = refiner()
        train(model, sgd(model), 3)
        model.eval()
        model.save(tmp_path / "both")
        again = IoURefiner.load(tmp_path / "both", TorchvisionAdapter(BUILDERS["faster_rcnn"]()))
        for one, other in zip(model(images()), again(images()), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert again.head.metadata.fingerprint == model.adapter.fingerprint()

    def test_training_goes_on_to_the_same_weights(self, tmp_path: Path) -> None:
        whole = refiner()
        train(whole, torch.optim.SGD(whole.parameters(), lr=0.01), 4)
        half = refiner()
        train(half, torch.optim.SGD(half.parameters(), lr=0.01), 2)
        half.save(tmp_path)
        again = IoURefiner.load(tmp_path, TorchvisionAdapter(BUILDERS["faster_rcnn"]())).train()
        optimizer = torch.optim.SGD(again.parameters(), lr=0.01)
        for step in (2, 3):
            torch.manual_seed(step)
            losses = again(images(), targets())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other), name

    def test_on_two_processes_both_learn_the_same(self, tmp_path: Path) -> None:
        script = tmp_path / "joint.py"
        script.write_text(DISTRIBUTED)
        first, second = processes.run(2, [str(script)], tmp_path)
        assert first.out == second.out
        assert len(first.out.strip()) == 64


DISTRIBUTED = """
import hashlib
import torch
from tests.adapters.test_joint_loop import images, refiner, sgd, targets
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = refiner()
both = torch.nn.parallel.DistributedDataParallel(model)
optimizer = sgd(model)
for step in range(3):
    torch.manual_seed(10 * step + rank)
    losses = both(images()[rank : rank + 1], targets()[rank : rank + 1])
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(hashlib.sha256(weights).hexdigest())
torch.distributed.destroy_process_group()
"""


class TestRefused:
    """What cannot be trained together says so, and how to go on."""

    def test_a_head_without_features(self) -> None:
        model = IoURefiner(tiny("faster_rcnn"), SiblingHead()).train()
        with pytest.raises(TypeError, match=r"reads no features .* refiner\.head\.eval\(\)"):
            model(images(), targets())

    def test_a_head_with_siblings(self) -> None:
        model = refiner()
        model.head.siblings = SiblingHead(SiblingConfig()).siblings
        with pytest.raises(ValueError, match=r"network over siblings"):
            model.train()(images(), targets())

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_a_weight_that_is_none(self, weight: float) -> None:
        with pytest.raises(ValueError, match="loss_weight"):
            refiner(loss_weight=weight)(images(), targets())

    def test_saving_without_a_head(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`save` keeps"):
            IoURefiner(tiny("faster_rcnn")).save(tmp_path)

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda path: path.unlink(), "no such file"),
            (lambda path: path.write_bytes(b"\x00" * 40), "not a readable safetensors file"),
        ],
    )
    def test_a_folder_that_is_damaged(self, spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
        refiner().save(tmp_path)
        spoil(tmp_path / "detector.safetensors")
        with pytest.raises(DataError, match=said):
            IoURefiner.load(tmp_path, tiny("faster_rcnn"))

    def test_weights_of_another_detector(self, tmp_path: Path) -> None:
        refiner().save(tmp_path)
        with pytest.raises(DataError, match="are not those of this RetinaNet"):
            IoURefiner.load(tmp_path, tiny("retinanet"))

    def test_weights_of_another_training(self, tmp_path: Path) -> None:
        model = refiner()
        model.save(tmp_path)
        head = (tmp_path / "head.safetensors").read_bytes()
        train(model, sgd(model), 1)
        model.save(tmp_path)
        (tmp_path / "head.safetensors").write_bytes(head)
        with pytest.raises(DataError, match="trained on the detector"):
            IoURefiner.load(tmp_path, tiny("faster_rcnn"))
