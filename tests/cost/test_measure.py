import jax
import jax.numpy as jnp

from dfkd_jax.cost.measure import cost


def test_cost_counts_products():
    n = 64
    product = jax.jit(jnp.matmul).lower(jnp.ones((n, n)), jnp.ones((n, n))).compile()
    flops, _ = cost(product)
    assert flops == 2 * n**3
