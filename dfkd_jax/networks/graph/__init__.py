"""Networks that came as a graph of PyTorch's operations: the graph, and a Flax module that runs it.

`program` is the graph and its file, `network` the module, `operations` one small function for each
operation, `tensors` what these functions are given.
"""
