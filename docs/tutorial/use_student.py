"""Load a distilled student in PyTorch: `python use_student.py lenet5_half student.safetensors`."""

import sys

from mnist import accuracy
from networks import NETWORKS
from safetensors.torch import load_file

name, file = sys.argv[1:]
network = NETWORKS[name]()
network.load_state_dict(load_file(file))
print(f"{name} in PyTorch: test accuracy {accuracy(network):.2f} %")
