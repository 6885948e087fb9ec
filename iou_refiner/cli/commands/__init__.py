"""The commands, one a file. See :mod:`iou_refiner.cli.app` for what they share."""
