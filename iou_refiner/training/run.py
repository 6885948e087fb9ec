"""The files of a training run. Each is written beside its place and renamed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError
from iou_refiner.files import replacing, write_whole
from iou_refiner.head.checkpoint import save_head
from iou_refiner.head.iou_head import IoUHead


class TrainingRun:
    """What is kept of a training run: the head, its metrics, and the state to resume from.

    Args:
        folder: where; None keeps nothing.
        settings: that must be the same to resume.
        head, optimizer, schedule: what is trained.
    """

    def __init__(
        self, folder: str | Path | None, settings: dict[str, Any], head: IoUHead, optimizer: Any, schedule: Any
    ):
        self.folder, self.settings = None if folder is None else Path(folder), settings
        self._head = head
        self._parts = {"head": head, "optimizer": optimizer, "schedule": schedule}
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> list[dict[str, float]]:
        """Load the last state, if there is one; returns the metrics of the epochs done.

        Raises:
            DataError: it was made with other settings.
        """
        if not self.folder or not (self.folder / "last.pt").exists():
            return []
        state = torch.load(self.folder / "last.pt", weights_only=True, map_location=self._head.device)
        changed = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        if changed:
            raise DataError(
                f"{self.folder / 'last.pt'} was made with another {', '.join(changed)}: "
                "resume with the same settings, or train into another folder."
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        history: list[dict[str, float]] = state["history"]
        self._describe(history)
        return history

    def save(self, history: list[dict[str, float]]) -> None:
        """Write the head as it is now, the metrics of all epochs, and the state to resume from."""
        self._describe(history)
        if not self.folder:
            return
        save_head(self._head, self.folder / "head.safetensors")
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        write_whole(self.folder / "metrics.jsonl", lines.encode())
        state = {name: part.state_dict() for name, part in self._parts.items()}
        with replacing(self.folder / "last.pt") as stream:
            torch.save(state | {"history": history, "settings": self.settings}, stream)

    def _describe(self, history: list[dict[str, float]]) -> None:
        """Note in the head how it was trained, and what its last epoch measured."""
        # Without the seconds: the same seed gives the same bytes.
        metrics = {name: value for name, value in history[-1].items() if name != "seconds"}
        self._head.metadata = replace(self._head.metadata, training=self.settings, metrics=metrics)
