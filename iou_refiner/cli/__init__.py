"""The command line."""

from iou_refiner.cli.app import app as app
from iou_refiner.cli.app import main as main
