"""COCO AP with confidence intervals, and how well the predicted IoU agrees with the true one."""
