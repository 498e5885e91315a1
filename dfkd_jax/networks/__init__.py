"""Networks: the classifiers by name, the generator, the encoder, and layers they are made of.

`models` makes those of a configuration, `given` takes those that somebody has in memory.
"""
