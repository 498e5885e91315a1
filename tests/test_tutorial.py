"""The tutorial's PyTorch networks are those that the converter knows."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dfkd_jax.classifiers import create_classifier
from dfkd_jax.torch_layouts import from_torch

NETWORKS = Path(__file__).parent.parent / "docs" / "tutorial" / "networks.py"
SHAPE = (32, 32, 1)


@pytest.mark.parametrize("name", ["lenet5", "lenet5_half", "wrn16_1"])
def test_a_network_of_the_tutorial_converts_with_its_logits(name):
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("tutorial_networks", NETWORKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    network = module.NETWORKS[name]().eval()
    state_dict = {key: value.numpy() for key, value in network.state_dict().items()}
    variables, _ = from_torch(name, 10, SHAPE, state_dict)
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits, _ = create_classifier(name, 10).apply(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
