"""Train a classifier of MNIST in PyTorch: `python train_teacher.py lenet5 lenet5.pt 20`."""

import sys

import torch
from mnist import accuracy, load
from networks import NETWORKS
from torch.nn.functional import cross_entropy

name, file, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
network = NETWORKS[name]()
images, labels = load("train")
steps = epochs * (len(labels) // 128)
optimizer = torch.optim.SGD(
    network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for epoch in range(1, epochs + 1):
    network.train()
    for batch in torch.randperm(len(labels)).split(128)[: len(labels) // 128]:
        loss = cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch}/{epochs}  loss {loss.item():.3f}", flush=True)
torch.save(network.state_dict(), file)
print(f"{name}: test accuracy {accuracy(network):.2f} %, saved in {file}")
