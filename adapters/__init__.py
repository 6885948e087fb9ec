"""Adapters: a file or a folder for each detector framework, which translates between the framework and the core.

The contract is :class:`iou_refiner.detector.adapter.Adapter`. An adapter knows the core; the core knows no adapter: it
finds them as entry points of the group ``iou_refiner.adapters``, where the packages of third parties may add their own.
"""
