"""The detector as the core sees it: the adapter contract, feature maps and candidates of images, views, caches."""
