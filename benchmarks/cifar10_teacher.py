"""Train a CIFAR-10 teacher in PyTorch: `python benchmarks/cifar10_teacher.py MODEL FILE`.

MODEL is wrn16_2 or cnn, those of `results`. On a CPU that multiplies bfloat16 fast (AMX) it takes
a fraction of the time that `dfkd_jax.main` takes for the same teacher. `python -m dfkd_jax.convert
FILE --model=MODEL --dataset=cifar10 --output=DIR` brings it over.
"""

import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, pad

from dfkd_jax import data
from dfkd_jax.data_table import SPECS

sys.path.insert(0, str(Path(__file__).parent.parent / "docs" / "tutorial"))
from networks import WideResNet

SPEC = SPECS["cifar10"]
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 0.1, 5e-4


class CNN(torch.nn.Module):
    """The network `cnn` of `dfkd_jax.classifiers`, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64)
        for i in (1, 2, 3):
            stride = 1 if i == 1 else 2
            conv = torch.nn.Conv2d(*widths[i - 1 : i + 1], 3, stride, padding=1, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", torch.nn.BatchNorm2d(widths[i]))
        self.fc1 = torch.nn.Linear(64, 64)
        self.fc = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to logits (B, 10)."""
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        return self.fc(self.fc1(x.mean((2, 3))).relu())


NETWORKS = {"wrn16_2": (lambda: WideResNet(16, 2, channels=3), 15), "cnn": (CNN, 30)}  # epochs


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images (N, 3, 32, 32) and labels."""
    images, labels = data.load(SPEC, split)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (SPEC.mean, SPEC.std))
    return (images - mean) / std, torch.from_numpy(labels).long()


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random crops of the images padded by 4 and random mirror images, each drawn on its own."""
    count, _, height, width = images.shape
    padded = pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count, 1, 1))
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).expand(count, 1, -1)
    columns = left + torch.where(torch.rand(count, 1, 1) < 0.5, columns, width - 1 - columns)
    chosen = padded.permute(0, 2, 3, 1)[torch.arange(count).view(-1, 1, 1), rows, columns]
    return chosen.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in float32, percent."""
    network.eval()
    predicted = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return 100.0 * (predicted == labels).float().mean().item()


def main(model: str, file: str) -> None:
    """SGD with Nesterov momentum, cosine to 0, cross-entropy."""
    create, epochs = NETWORKS[model]
    torch.manual_seed(0)
    network = create().to(memory_format=torch.channels_last)
    images, labels = load("train")
    test = load("test")
    steps = len(labels) // BATCH
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        network.train()
        for chosen in torch.randperm(len(labels)).split(BATCH)[:steps]:
            batch = augment(images[chosen]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = network(batch)
            loss = cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch}/{epochs}  loss {loss.item():.3f}  test accuracy "
            f"{accuracy(network, *test):.2f} %  {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    torch.save(network.state_dict(), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
