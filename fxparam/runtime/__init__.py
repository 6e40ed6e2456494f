"""Everything under a training script: the cache of weights, its autograd bridge, and the module users hold."""
