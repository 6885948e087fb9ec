"""What the other candidates around a box know of it."""
