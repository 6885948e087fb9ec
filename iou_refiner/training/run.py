"""The files of a training run. Each is written beside its place and renamed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError, check_number
from iou_refiner.files import replacing, to_json, write_whole
from iou_refiner.head.checkpoint import save_head
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.parallel.ranks import current


@dataclass(frozen=True)
class Begun:
    """How far an epoch has come.

    Args:
        steps: that were done.
        boxes: that they saw.
        loss_of_boxes: the loss of each step times its boxes, added up.

    Raises:
        ValueError: a number is none, or below 0.
    """

    steps: int = 0
    boxes: int = 0
    loss_of_boxes: float = 0.0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 0, 1e15, whole=True)
        check_number("boxes", self.boxes, 0, 1e18, whole=True)
        check_number("loss_of_boxes", self.loss_of_boxes, -math.inf, math.inf)

    def after(self, loss: float, boxes: int) -> Begun:
        """One step further."""
        return Begun(self.steps + 1, self.boxes + boxes, self.loss_of_boxes + loss * boxes)

    @property
    def loss(self) -> float:
        """The mean over the boxes."""
        return self.loss_of_boxes / max(self.boxes, 1)


class TrainingRun:
    """What is kept of a training run: the head, its metrics, and the state to resume from.

    Of several processes, which are all alike, the first one writes, and each reads.

    Args:
        folder: where; None keeps nothing.
        settings: that must be the same to resume.
        head, optimizer, schedule: what is trained.
        minutes: between two checkpoints within an epoch.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: dict[str, Any],
        head: IoUHead,
        optimizer: Any,
        schedule: Any,
        *,
        minutes: float = 10,
    ):
        self.folder, self.settings = None if folder is None else Path(folder), settings
        self._head = head
        self._parts = {"head": head, "optimizer": optimizer, "schedule": schedule}
        self._seconds, self._kept = 60 * minutes, time.monotonic()
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> tuple[list[dict[str, float]], Begun]:
        """Load the last state, if there is one; returns the metrics of the epochs done, and how far the next has come.

        Raises:
            DataError: it was made with other settings.
        """
        if not self.folder or not (self.folder / "last.pt").exists():
            return [], Begun()
        state = self._state()
        changed = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        made_with = state.get("about", {})  # runs of before do not say
        changed += [name for name, value in self._about_head().items() if made_with.get(name, value) != value]
        if changed:
            raise DataError(
                f"{self.folder / 'last.pt'} was made with another {', '.join(changed)}: "
                "resume with the same settings, or train into another folder."
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            begun = Begun(**state.get("begun", {}))  # runs of before keep whole epochs alone
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise self._damaged(error) from None
        history: list[dict[str, float]] = state["history"]
        if history:
            self._describe(history)
        current().wait()  # before the first process replaces what the others read
        return history, begun

    def _state(self) -> dict[str, Any]:
        """What is in ``last.pt``; only tensors and plain values are read, nothing is run."""
        assert self.folder is not None
        try:
            state = torch.load(self.folder / "last.pt", weights_only=True, map_location=self._head.device)
        except Exception as error:  # the readers of zip files and pickles raise whatever the bytes make them
            raise self._damaged(error) from None
        state = state if isinstance(state, dict) else {}
        kinds = {"settings": dict, "history": list, **dict.fromkeys(self._parts, dict)}
        wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
        started = bool(state.get("history") or state.get("begun"))
        if wrong or not started or not all(isinstance(entry, dict) for entry in state["history"]):
            raise self._damaged(f"it lacks {', '.join(wrong) or 'epochs'}")
        whole: dict[str, Any] = state
        return whole

    def _damaged(self, why: object) -> DataError:
        first = (str(why).splitlines() or [type(why).__name__])[0]
        return DataError(
            f"{self.folder}/last.pt is damaged or no state of a training ({first}). Train without --resume, which "
            "starts anew (the features in the cache are used again), or into another folder."
        )

    def _about_head(self) -> dict[str, Any]:
        """What must be the same for the weights to fit: the architecture, and whose features they read."""
        head = self._head
        about = {name: _plain(value) for name, value in asdict(head.config).items()}
        about |= {"channels": list(head.channels), "strides": list(head.strides), "num_classes": head.num_classes}
        return about | {"detector": head.metadata.fingerprint}

    def save(self, history: list[dict[str, float]]) -> None:
        """Write the head as it is now, the metrics of all epochs, and the state to resume from."""
        self._describe(history)
        if not self.folder or not current().first:
            return
        save_head(self._head, self.folder / "head.safetensors")
        lines = "".join(to_json(entry) + "\n" for entry in history)
        write_whole(self.folder / "metrics.jsonl", lines.encode())
        self._keep(self.folder, history, Begun())

    def checkpoint(self, history: list[dict[str, float]], begun: Begun) -> None:
        """Write the state to resume from, if the last time is long enough ago."""
        if self.folder and current().first and time.monotonic() - self._kept >= self._seconds:
            self._keep(self.folder, history, begun)

    def _keep(self, folder: Path, history: list[dict[str, float]], begun: Begun) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"history": history, "settings": self.settings, "about": self._about_head(), "begun": asdict(begun)}
        with replacing(folder / "last.pt") as stream:
            torch.save(state, stream)
        self._kept = time.monotonic()

    def _describe(self, history: list[dict[str, float]]) -> None:
        """Note in the head how it was trained, and what its last epoch measured."""
        # Without the seconds: the same seed gives the same bytes.
        metrics = {name: _or_none(value) for name, value in history[-1].items() if name != "seconds"}
        self._head.metadata = replace(self._head.metadata, training=self.settings, metrics=metrics)


def _or_none(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
