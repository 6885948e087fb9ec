"""Precise RoI Pooling: the exact mean of the interpolated features under a box, on the CPU and on the GPU."""
