"""The feature maps of a batch laid out for pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iou_refiner.structures import FeatureMaps


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """All feature maps of a batch as one channels-last table: laid out once, any boxes can be pooled from it.

    Map ``image * num_levels + level`` of ``H x W`` cells is ``H * W`` consecutive rows of the table, row by row.

    From float16 or bfloat16 maps comes a table of their type, of half the memory. The CUDA kernels read it as it is and
    compute in float32. On random features this rounds the pooled values by 2.9e-4 and 2.3e-3 of their size (root mean
    square), the gradient to the boxes by 2.9e-4 and 3.4e-3 of the largest. On the CPU it only saves memory: the rows
    under the boxes are widened at every call, and a call takes 1.4 to 1.8 times as long as with a float32 table.

    Args:
        cells: (rows, C) features, contiguous.
        sizes: (M, 2) int32, height and width of each map, M = images * levels.
        offsets: (M,) int64, first row of each map.
        strides: (M,) float32, network pixels per cell of each map.
        num_levels: levels per image.
    """

    cells: Tensor
    sizes: Tensor
    offsets: Tensor
    strides: Tensor
    num_levels: int

    @classmethod
    def from_maps(cls, features: FeatureMaps, narrow: Sequence[tuple[Tensor, Tensor]] = ()) -> FeatureTable:
        """Lay out feature maps as a table, differentiably: one copy, and none of one level in channels-last memory.

        Args:
            features: the maps. Where nothing is copied, the table is a view of them.
            narrow: for each level a matrix (width, C) and a bias (width,) that map its cells on their way into the
                table, as a 1x1 convolution would its channels.

        Raises:
            ValueError: nothing narrows the levels, and they differ in their number of channels.
        """
        if not narrow and len(set(features.channels)) != 1:
            raise ValueError(
                f"A table needs the same channels on every level, got {features.channels}. "
                "Project the levels to one width first, as IoUHead.encode does."
            )
        grad, device = torch.is_grad_enabled(), features.device
        # Tensors made in inference mode could never take part in an ascent, which runs outside of it.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            shapes = [(level.shape[2], level.shape[3]) for level in features.levels] * len(features)
            sizes = torch.tensor(shapes, dtype=torch.int32).reshape(-1, 2)
            areas = sizes.long().prod(1)
            table = _narrowed(features, narrow) if narrow else _laid_out(features)
            strides = torch.tensor(features.strides * len(features), dtype=torch.float32)
            offsets = areas.cumsum(0) - areas
            return cls(table, sizes.to(device), offsets.to(device), strides.to(device), len(features.strides))

    @classmethod
    def concat(cls, parts: Sequence[FeatureTable]) -> FeatureTable:
        """The images of several tables in one. Their maps may differ in size: each keeps its own."""
        if len({part.num_levels for part in parts}) != 1:
            raise ValueError(f"Tables must have equally many levels, got {[part.num_levels for part in parts]}.")
        rows = torch.tensor([0, *(len(part.cells) for part in parts[:-1])]).cumsum(0).tolist()
        return cls(
            torch.cat([part.cells for part in parts]),
            torch.cat([part.sizes for part in parts]),
            torch.cat([part.offsets + start for part, start in zip(parts, rows, strict=True)]),
            torch.cat([part.strides for part in parts]),
            parts[0].num_levels,
        )

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.cells.device

    @property
    def num_images(self) -> int:
        """Images in the table."""
        return len(self.sizes) // self.num_levels


def _cells(features: FeatureMaps) -> list[Tensor]:
    """Each map as the rows of a table, (H W, C): views, whatever the memory layout."""
    return [level[image].flatten(1).t() for image in range(len(features)) for level in features.levels]


def _laid_out(features: FeatureMaps) -> Tensor:
    if len(features.levels) == 1:
        table = features.levels[0].permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        return table.clone() if not torch.compiler.is_compiling() and table.is_inference() else table
    return torch.cat(_cells(features) or [features.levels[0].new_zeros(0, features.channels[0])])


def _narrowed(features: FeatureMaps, narrow: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One product for each map, which reads either memory layout as it is, and writes its rows of the table."""
    cells = _cells(features)
    layers = list(narrow) * len(features)
    table = narrow[0][1].new_empty(sum(map(len, cells)), len(narrow[0][1]))
    if torch.is_grad_enabled() and cells:
        return torch.cat([torch.addmm(b, rows, w.t()) for rows, (w, b) in zip(cells, layers, strict=True)])
    for part, rows, (weight, bias) in zip(table.split([len(rows) for rows in cells]), cells, layers, strict=True):
        torch.addmm(bias, rows, weight.t(), out=part)
    return table
