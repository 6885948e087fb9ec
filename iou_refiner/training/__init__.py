"""Training of the head on the features of a frozen detector."""
