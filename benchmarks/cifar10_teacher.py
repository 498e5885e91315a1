"""Train the WRN-16-2 of `results/cifar10` in PyTorch: `python benchmarks/cifar10_teacher.py FILE`.

On a CPU that multiplies bfloat16 fast (AMX) it takes a fraction of the time that `dfkd_jax.main`
takes for the same teacher. `python -m dfkd_jax.convert FILE --model=wrn16_2 --dataset=cifar10
--output=DIR` brings it over.
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
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 15, 128, 0.1, 5e-4


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


def main(file: str) -> None:
    """SGD with Nesterov momentum, cosine to 0, cross-entropy."""
    torch.manual_seed(0)
    network = WideResNet(16, 2, channels=3).to(memory_format=torch.channels_last)
    images, labels = load("train")
    test = load("test")
    steps = len(labels) // BATCH
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    for epoch in range(1, EPOCHS + 1):
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
            f"epoch {epoch}/{EPOCHS}  loss {loss.item():.3f}  test accuracy "
            f"{accuracy(network, *test):.2f} %  {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    torch.save(network.state_dict(), file)


if __name__ == "__main__":
    main(sys.argv[1])
