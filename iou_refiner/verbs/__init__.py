"""What the command line does, as functions: train, rescore, evaluate, report. They hold no recipe of their own.

Each takes what is at hand (paths or objects already read, a live detector or its name) and gives a small object that
prints as a table, shows as one in a notebook, and has ``to_dict``.
"""
