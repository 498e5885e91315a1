"""Stands in the way of PyTorch, which tensorboardX would import at every start if it is there."""

raise ImportError("processes of the tests run without PyTorch")
