"""Networks of a user's own, for the tests."""

import flax.linen as nn
import jax


class LayerNormNet(nn.Module):
    """Normalised without statistics that are kept."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        features = nn.LayerNorm()(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))
        return nn.Dense(self.num_classes)(features), features


class Plain(nn.Module):
    """No batch norm, no fields beside the number of classes."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        features = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes)(features), features


class Normed(Plain):
    @nn.compact
    def __call__(self, x, train=False):
        features = nn.BatchNorm(use_running_average=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes)(features), features


class SmallNet(nn.Module):
    """As small as a network with convolution, batch norm and features can be; on any devices."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, momentum=0.9)(x)
        features = nn.relu(x).mean((1, 2))
        return nn.Dense(self.num_classes)(features), features
