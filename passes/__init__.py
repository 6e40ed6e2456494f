"""Transformations of programs, one file each. The pipeline is the tuple in ``fxparam.pipeline``."""
