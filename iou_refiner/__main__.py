"""``python -m iou_refiner``: the command line, so that ``torchrun -m iou_refiner train ...`` works."""

from iou_refiner.cli import main

if __name__ == "__main__":
    main()
