"""Many processes that do one job, as torchrun starts them."""
