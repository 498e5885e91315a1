"""The counts of the cost model."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks.scaling import collectives, cost
from benchmarks.vit import ViT
from dfkd_jax.networks.own_module import check_call
from dfkd_jax.run.gradients_flag import with_gradient
from tests.helpers.devices import on
from tests.helpers.tiny import tiny_config

# No batch norm, so that nothing but gradients and losses is averaged over the devices.
TinyViT = partial(ViT, patch=4, width=8, depth=1, heads=2)


def test_collectives_are_counted_with_their_bytes():
    hlo = """
      %a = f32[64,3]{1,0} all-reduce(%x), replica_groups={}
      %b = (f32[2]{0}, bf16[10]{0}) all-reduce(%y, %z), to_apply=%sum
      %c = f32[] all-reduce-start(%w)
      %d = f32[8,2]{1,0} all-gather(%v), dimensions={0}
      %e = f32[4]{0} add(%v, %all-reduce.7)
    """
    assert collectives(hlo) == {"all-reduce": (3, 768 + 28 + 4), "all-gather": (1, 64)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "measured, expected",
    [
        (True, {"first_order": 3, "exact": 4}),
        (False, {"exact": 3}),
    ],
)
def test_exact_sends_one_gradient_more_than_first_order(measured, expected):
    """The table of docs/scaling.md; beside gradients only scalars and statistics."""
    name = f"{__name__}:TinyViT"
    student = TinyViT(num_classes=10)
    check_call(student, name, (8, 8, 1), 10)
    images = jnp.zeros((2, 8, 8, 1))
    params = jax.eval_shape(lambda: student.init(jax.random.key(0), images))
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    gradients = {}
    for variant in expected:
        fields = {"student.model": name, "meta.measure_alignment": measured}
        config = with_gradient(tiny_config("lra-mb", **fields), variant)
        sent = cost(config, on(2, "shard_map"), "student").collectives
        assert set(sent) == {"all-reduce"}
        gradients[variant], rest = divmod(sent["all-reduce"][1], size)
        assert rest < 0.1 * size
    assert gradients == expected
