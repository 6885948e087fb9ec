"""The IoU head: the small network that is trained, and the file it is kept in."""
