"""The IoU predictor: a small head that says how well a box fits its object, and where a better box lies.

Three pieces, cheapest first: a 1x1 convolution per level narrows the detector's frozen feature maps to a common width,
once per image; Precise RoI Pooling reads a box from three successive levels, the finest of them the one FPN gives a box
of its size; what the bins hold is mixed, and two fully connected layers turn it into an IoU.

The paper pools one level of 256 channels into 2 x FC1024, and its first layer is 90 % of the cost of the refinement
loop. Narrowing before pooling costs the same as after it (both are linear) but is paid once per image, not per box and
step. Finer levels than these three hold four times the cells each, and say nothing a bin of a seventh of the box could
keep; three levels at scales that go with the box also look alike to the layers behind, whatever its size.

Two more outputs cost nothing beside the trunk. The *energy* puts the boxes around one object in order: it has no unit
and says nothing of boxes of different objects, but which of a cluster fits best, and which way leads uphill, it knows
better than the IoU does. The *way*, four numbers, is one step of box regression, which moves boxes further than the
ascent does where there are few images to learn from.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from iou_refiner.boxes import decode_boxes
from iou_refiner.checks import DataError, check_choice, check_positive
from iou_refiner.head.checkpoint import read_metadata, write_head
from iou_refiner.head.trunk import Trunk
from iou_refiner.pooling.functional import assign_levels, prroi_pool
from iou_refiner.pooling.table import FeaturePyramid
from iou_refiner.structures import FeatureMaps

OBJECTIVES = ("bce", "smooth_l1")
# What regression has to predict is about this large, in relative coordinates (shifts, then log sizes): the output is in
# these units, as in every R-CNN.
WAY_SPREAD = (0.1, 0.1, 0.2, 0.2)
# Boxes pooled at once when predicting without gradients: bounds memory, not results.
_CHUNK_BOXES = 1024


class IoUPredictor(nn.Module):
    """Predicts the IoU of boxes with the objects they mean.

    Args:
        channels: channels of each feature level, finest first.
        strides: pixels per cell of each level.
        num_classes: 0 for one class-agnostic output; otherwise one output for each of the labels 0 to K - 1.
        width: channels after the narrowing; 0 pools the maps as they are (then all levels need equal channels).
        mix: channels of each bin after its levels and channels are mixed; 0 mixes nothing, see :class:`Trunk`.
        hidden: sizes of the fully connected layers.
        output_size: bins per side of the pooling.
        context: side of the pooled region over that of the box, about the same centre. Above 1 the head also sees what
            lies just outside each edge, which is where a box too small shows.
        levels: how many levels each box is read from: the one FPN gives it and the next coarser ones. 1 is the paper's;
            as many as there are, or more, reads every box from all.
        aligned: see :func:`prroi_pool`.
        order: also learn the order of the boxes around one object, see :meth:`worth`.
        regress: also predict where a better box lies, see :meth:`move`.
        objective: what the output means, and so how :meth:`iou` maps it to [0, 1]: ``"bce"`` a logit,
            ``"smooth_l1"`` the paper's ``2 IoU - 1``.
        detector: fingerprint of the detector the head belongs to; checked when it is put to use.
        detector_name: what to call that detector.
        recommended: settings of the :class:`Stage` that measured best with this head, used unless others are given.

    Laws: the prediction for a box does not depend on the other boxes; it is continuously differentiable in the box
    while its levels stay, which :meth:`finest_level` can hold.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        *,
        num_classes: int = 0,
        width: int = 48,
        mix: int = 32,
        hidden: Sequence[int] = (320, 256),
        output_size: int = 7,
        context: float = 1.5,
        levels: int = 3,
        aligned: bool = True,
        order: bool = True,
        regress: bool = True,
        objective: str = "bce",
        detector: str = "",
        detector_name: str = "",
        recommended: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_positive("levels", levels)
        check_choice("objective", objective, OBJECTIVES)
        check_positive("output_size", output_size)
        check_positive("context", context)
        if len(channels) != len(strides) or not channels:
            raise ValueError(f"`channels` and `strides` need one entry per level, got {len(channels)}, {len(strides)}.")
        if width == 0 and len(set(channels)) != 1:
            raise ValueError(f"`width=0` pools the maps as they are and needs equal channels, got {tuple(channels)}.")
        self.channels, self.strides = tuple(map(int, channels)), tuple(map(float, strides))
        self.num_classes, self.width = int(num_classes), int(width)
        self.mix, self.hidden = int(mix), tuple(map(int, hidden))
        self.output_size, self.context, self.aligned = int(output_size), float(context), bool(aligned)
        self.levels, self.objective = int(levels), objective
        self.detector, self.detector_name = detector, detector_name
        self.order, self.regress = bool(order), bool(regress)
        self.recommended: dict[str, Any] = dict(recommended or {})

        pooled = self.width or self.channels[0]
        self.narrow = nn.ModuleList(nn.Conv2d(c, self.width, 1) if self.width else nn.Identity() for c in self.channels)
        self._read_from = min(self.levels, len(self.channels))
        self.trunk = Trunk(self._read_from, self.output_size**2, pooled, mix=self.mix, hidden=self.hidden)
        self.output = nn.Linear(self.trunk.out_features, max(self.num_classes, 1))
        self.energy = nn.Linear(self.trunk.out_features, 1) if order else None
        self.delta = nn.Linear(self.trunk.out_features, 4) if regress else None
        for output in (self.output, self.energy, self.delta):
            if output is not None:
                nn.init.normal_(output.weight, std=0.01)
                nn.init.zeros_(output.bias)

    def encode(self, features: FeatureMaps) -> FeaturePyramid:
        """Narrow the maps and lay them out for pooling; once per batch of images, then ask for any boxes.

        The pyramid is on the head's device and in its dtype, wherever the features are.

        Raises:
            ValueError: the features are not of the channels and strides the head was made for.
        """
        if features.channels != self.channels or features.strides != self.strides:
            raise ValueError(
                f"The head was made for {len(self.channels)} levels of {self.channels} channels at strides "
                f"{self.strides}; these features have {features.channels} channels at strides {features.strides}."
            )
        weight = self.output.weight  # cached features may lie on another device, or be stored in half precision
        levels = tuple(level.to(weight) for level in features.levels)
        # On the CPU a 1x1 convolution copies a map before it multiplies, and would leave another to be laid out.
        layers: Iterable[nn.Module] = self.narrow if self.width else ()
        narrow = [(layer.get_parameter("weight").flatten(1), layer.get_parameter("bias")) for layer in layers]
        return FeaturePyramid.from_maps(FeatureMaps(levels, features.strides, features.image_sizes), narrow)

    def finest_level(self, boxes: Tensor) -> Tensor:
        """The finest of the levels each box is read from, (R,) int64.

        Ask once, before an ascent, and pass the answer along: levels that changed on the way would make the objective
        jump.
        """
        last = len(self.strides) - self._read_from
        return assign_levels(boxes, self.strides[: last + 1])

    def forward(
        self,
        pyramid: FeaturePyramid,
        boxes: Tensor,
        image_index: Tensor,
        labels: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Raw output for each box, monotone in the predicted IoU; :meth:`iou` maps it to [0, 1].

        Args:
            pyramid: from :meth:`encode`.
            boxes: (R, 4) float xyxy in network pixels; differentiable.
            image_index: (R,) integer, image of each box.
            labels: (R,) integer class of each box; needed by a class-aware head.
            level: (R,) from :meth:`finest_level`; default: asked here.

        Returns:
            (R,) float32.
        """
        return self.fit_of(self.read(pyramid, boxes, image_index, level), labels)

    def worth(
        self,
        pyramid: FeaturePyramid,
        boxes: Tensor,
        image_index: Tensor,
        labels: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """How each box compares with others around the same object, in [0, 1]: what suppression ranks by and the ascent
        climbs. Arguments as :meth:`forward`.

        Of a head that learned the order it is the sigmoid of the energy, else the predicted IoU.

        Returns:
            (R,) float32, differentiable in the boxes.
        """
        if self.energy is None:
            return self.iou(self(pyramid, boxes, image_index, labels, level))
        return self.energy_of(self.read(pyramid, boxes, image_index, level)).sigmoid()

    @torch.no_grad()
    def move(self, pyramid: FeaturePyramid, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Better boxes (R, 4) for boxes (R, 4), by one step of regression; not clipped to the image.

        Raises:
            ValueError: the head was made with ``regress=False``.
        """
        parts = [slice(i, i + _CHUNK_BOXES) for i in range(0, len(boxes), _CHUNK_BOXES)]
        ways = [self.way_of(self.read(pyramid, boxes[part], image_index[part])) for part in parts]
        return decode_boxes(torch.cat(ways), boxes) if ways else boxes

    def read(self, pyramid: FeaturePyramid, boxes: Tensor, image_index: Tensor, level: Tensor | None = None) -> Tensor:
        """What the trunk makes of each box, (R, hidden[-1]); arguments as :meth:`forward`."""
        if level is None:
            level = self.finest_level(boxes)
        count, margin = self._read_from, (boxes[:, 2:] - boxes[:, :2]) * ((self.context - 1) / 2)
        seen = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
        pooled = prroi_pool(
            pyramid,
            seen.repeat(count, 1),  # level by level, so that what is pooled from one lies together
            image_index=image_index.repeat(count),
            level=torch.cat([level + step for step in range(count)]),
            output_size=self.output_size,
            aligned=self.aligned,
        )
        rows = pooled.permute(0, 2, 3, 1).view(count, len(boxes), self.output_size**2, pooled.shape[1])
        read: Tensor = self.trunk(rows)
        return read

    def fit_of(self, read: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raw output (R,) from what was :meth:`read`."""
        out: Tensor = self.output(read).float()
        if not self.num_classes:
            return out[:, 0]
        if labels is None:
            raise ValueError("`labels` must be given: this head predicts one IoU per class.")
        return out.gather(1, labels[:, None])[:, 0]

    def energy_of(self, read: Tensor) -> Tensor:
        """From what was :meth:`read`: the energy (R,), higher for the better of two boxes around one object.

        Raises:
            ValueError: the head was made with ``order=False``.
        """
        if self.energy is None:
            raise ValueError("This head has no energy. Make one with `order=True` to learn the order of boxes.")
        out: Tensor = self.energy(read).float()
        return out[:, 0]

    def way_of(self, read: Tensor) -> Tensor:
        """From what was :meth:`read`: the way (R, 4) to a better box, in the relative coordinates of
        :func:`~iou_refiner.boxes.encode_boxes`.

        Raises:
            ValueError: the head was made with ``regress=False``.
        """
        if self.delta is None:
            raise ValueError("This head only predicts the IoU. Make one with `regress=True` to predict better boxes.")
        out: Tensor = self.delta(read).float()
        return out * out.new_tensor(WAY_SPREAD)

    def iou(self, raw: Tensor) -> Tensor:
        """Raw output to IoU in [0, 1]; NaN stays NaN."""
        return raw.sigmoid() if self.objective == "bce" else torch.clamp((raw + 1) / 2, 0, 1)

    @torch.no_grad()
    def judge(
        self, pyramid: FeaturePyramid, boxes: Tensor, image_index: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predicted IoU (R,) and :meth:`worth` (R,) of any number of boxes, both in [0, 1], in bounded memory.

        NaN where they cannot be predicted.
        """
        ious, worths = [boxes.new_zeros(0)], [boxes.new_zeros(0)]
        for part in (slice(i, i + _CHUNK_BOXES) for i in range(0, len(boxes), _CHUNK_BOXES)):
            asked = (pyramid, boxes[part], image_index[part])
            named = None if labels is None else labels[part]
            if self.energy is None:
                ious.append(self.iou(self(*asked, named)))
                worths.append(ious[-1])
            else:
                read = self.read(*asked)
                ious.append(self.iou(self.fit_of(read, named)))
                worths.append(self.energy_of(read).sigmoid())
        return torch.cat(ious), torch.cat(worths)

    def predict(
        self, pyramid: FeaturePyramid, boxes: Tensor, image_index: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Predicted IoU (R,) alone, of what :meth:`judge` gives."""
        return self.judge(pyramid, boxes, image_index, labels)[0]

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write weights and settings to a safetensors file, whole or not at all. ``notes`` (json) go along."""
        write_head(path, self._settings(), self.state_dict(), notes)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> IoUPredictor:
        """Read a head written by :meth:`save`.

        Raises:
            DataError: the file is missing, damaged, or not a head.
        """
        about = read_metadata(path)
        try:
            head = cls(**about["settings"])
            head.load_state_dict(safetensors.torch.load_file(path))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path}: settings and weights do not make a head ({error}).") from None
        return head.to(device).eval()

    def _settings(self) -> dict[str, object]:
        names = list(inspect.signature(IoUPredictor).parameters)  # each is kept under its own name
        return {name: getattr(self, name) for name in names}


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights and buffers: equal before and after means frozen."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
