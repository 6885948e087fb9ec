"""The stage: what is done with the head in place of a detector's own NMS."""
