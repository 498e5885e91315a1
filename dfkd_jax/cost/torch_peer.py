"""The same iteration in PyTorch with higher, to compare speeds with.

A process of its own that idles until it is asked: the first line of standard input is the
description of the work in JSON (`dfkd_jax.cost.peer.describe`), each further one the name of what
to run, and each is answered by one line, {"seconds": ...}. Needs `torch` and `higher`.

The networks, batches, losses and optimizers are those of dfkd_jax. The inner loop is opened with
`copy_initial_weights=False`: with higher's default the retention term sends no gradient to the
student, and the meta-gradient is not computed.
"""

import json
import sys
import time

import higher
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from dfkd_jax.runtime.host_memory import keep_freed_memory


class LeNet5(nn.Module):
    def __init__(self, widths, channels, classes):
        super().__init__()
        first, second, third, features = widths
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.conv3 = nn.Conv2d(second, third, 5)
        self.fc1 = nn.Linear(third, features)
        self.fc = nn.Linear(features, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        features = F.relu(self.fc1(F.relu(self.conv3(x)).flatten(1)))
        return self.fc(features), features


class CNN(nn.Module):
    def __init__(self, widths, channels, classes):
        super().__init__()
        *convolutions, features = widths
        blocks = []
        for index, width in enumerate(convolutions):
            stride = 1 if index == 0 else 2
            blocks += [conv3(channels, width, stride), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*blocks)
        self.fc1 = nn.Linear(channels, features)
        self.fc = nn.Linear(features, classes)

    def forward(self, x):
        features = F.relu(self.fc1(self.body(x).mean((2, 3))))
        return self.fc(features), features


def conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3(width, width)
        self.shortcut = None if inputs == width else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x):
        a = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(a)
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + shortcut


class ResNet(nn.Module):
    """ResNet of basic blocks, or WideResNet of pre-activation blocks, for small images."""

    def __init__(self, block, counts, stem, widths, channels, classes):
        super().__init__()
        self.conv1, self.pre_activation = conv3(channels, stem), block is PreActivationBlock
        self.bn1 = nn.BatchNorm2d(widths[-1] if self.pre_activation else stem)
        blocks, inputs = [], stem
        for stage, (count, width) in enumerate(zip(counts, widths, strict=True)):
            for index in range(count):
                blocks.append(block(inputs, width, 2 if stage > 0 and index == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.conv1(x)
        if self.pre_activation:
            x = F.relu(self.bn1(self.blocks(x)))
        else:
            x = self.blocks(F.relu(self.bn1(x)))
        features = x.mean((2, 3))
        return self.fc(features), features


def resnet(counts):
    return lambda *io: ResNet(BasicBlock, counts, 64, (64, 128, 256, 512), *io)


def wide_resnet(depth, k):
    counts = ((depth - 4) // 6,) * 3
    return lambda *io: ResNet(PreActivationBlock, counts, 16, (16 * k, 32 * k, 64 * k), *io)


CLASSIFIERS = {
    "cnn": lambda *io: CNN((32, 64, 64, 64), *io),
    "cnn_half": lambda *io: CNN((16, 32, 32, 32), *io),
    "lenet5": lambda *io: LeNet5((6, 16, 120, 84), *io),
    "lenet5_half": lambda *io: LeNet5((3, 8, 60, 42), *io),
    "resnet18": resnet((2, 2, 2, 2)),
    "resnet34": resnet((3, 4, 6, 3)),
    "wrn16_1": wide_resnet(16, 1),
    "wrn16_2": wide_resnet(16, 2),
    "wrn40_1": wide_resnet(40, 1),
    "wrn40_2": wide_resnet(40, 2),
}


class Generator(nn.Module):
    def __init__(self, latent_dim, channels, image_shape, use_spectral_norm):
        super().__init__()
        self.again = image_shape[0] >= 64
        self.size = image_shape[0] // (8 if self.again else 4)
        wide, narrow = channels
        normalised = spectral_norm if use_spectral_norm else lambda layer: layer
        self.fc = nn.Linear(latent_dim, wide * self.size**2)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv1 = normalised(nn.Conv2d(wide, wide, 3, 1, 1))
        self.bn2 = nn.BatchNorm2d(wide, 0.8)
        self.conv2 = normalised(nn.Conv2d(wide, narrow, 3, 1, 1))
        self.bn3 = nn.BatchNorm2d(narrow, 0.8)
        self.conv3 = normalised(nn.Conv2d(narrow, image_shape[2], 3, 1, 1))
        self.bn4 = nn.BatchNorm2d(image_shape[2], affine=False)

    def forward(self, z):
        x = self.bn1(self.fc(z).view(len(z), -1, self.size, self.size))
        x = self.conv1(F.interpolate(x, scale_factor=2))
        x = F.leaky_relu(self.bn2(x), 0.2)
        x = self.conv2(F.interpolate(x, scale_factor=2))
        x = F.leaky_relu(self.bn3(x), 0.2)
        if self.again:
            x = F.interpolate(x, scale_factor=2)
        return self.bn4(torch.tanh(self.conv3(x)))


def distance(student, teacher):
    return (student - teacher).abs().mean()


class Work:
    def __init__(self, work):
        self.work = work
        self.device = torch.device(work["device"])
        self.layout = torch.channels_last if work["channels_last"] else torch.contiguous_format
        torch.manual_seed(0)
        io = (work["image_shape"][2], work["num_classes"])
        self.teacher = CLASSIFIERS[work["teacher"]](*io).eval().requires_grad_(False)
        self.student = CLASSIFIERS[work["student"]](*io).train()
        self.generator = Generator(
            work["latent_dim"], work["channels"], work["image_shape"], work["spectral_norm"]
        ).train()
        for network in (self.teacher, self.student, self.generator):
            network.to(self.device)
            # Annotated without it, and documented with it.
            network.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        self.student_optimizer = torch.optim.SGD(
            self.student.parameters(),
            work["student_learning_rate"],
            work["momentum"],
            weight_decay=work["weight_decay"],
        )
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), work["generator_learning_rate"]
        )
        height, width, channels = work["image_shape"]
        entries = (work["capacity"], work["entry_size"])
        images = torch.randn(entries[0] * entries[1], channels, height, width, device=self.device)
        images = images.contiguous(memory_format=self.layout)
        self.bank_images = images.unflatten(0, entries)  # each image lies as the layout has it
        self.bank_logits = torch.randn(*entries, work["num_classes"], device=self.device)
        self.next = 0

    def wait(self):
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def images(self):
        shape = (self.work["batch_size"], self.work["latent_dim"])
        return self.generator(torch.randn(*shape, device=self.device))

    def generator_step(self):
        work = self.work
        images = self.images()
        logits, features = self.teacher(images)
        student, _ = self.student(images)
        mean = F.softmax(logits, 1).mean(0)
        entropy = (mean * mean.log10()).sum()
        loss = (
            work["one_hot"] * F.cross_entropy(logits, logits.argmax(1))
            + work["information_entropy"] * entropy
            - work["activation"] * features.abs().mean()
            + work["adversarial"] * self.adversarial(logits, student)
        )
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()

    def adversarial(self, logits, student):
        if self.work["adversarial_form"] == "l1":
            return -distance(student, logits)
        temperature = self.work["temperature"]
        logits = logits.detach()  # the term reaches the generator through the student alone
        p, q = F.softmax(logits / temperature, 1), F.softmax(student / temperature, 1)
        m = (p + q) / 2
        p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, m))
        divergence = (m * (m.log() - (p.log() + q.log()) / 2)).mean()
        return 1 - divergence.clamp(0, 1)

    def student_step(self, keep=False):
        with torch.no_grad():
            images = self.images()
            logits = self.teacher(images)[0]
        entry = int(torch.randint(self.work["capacity"], ()))
        kept = self.bank_images[entry], self.bank_logits[entry]
        if self.work["mix"]:
            shape = (self.work["entry_size"],)
            chosen = torch.randint(self.bank_logits[..., 0].numel(), shape, device=self.device)
            kept = (k.flatten(0, 1)[chosen] for k in (self.bank_images, self.bank_logits))
        replayed, replayed_logits = kept
        self.student_optimizer.zero_grad()
        gradient = getattr(self, self.work["variant"])
        gradient(images, logits, replayed, replayed_logits)
        self.student_optimizer.step()
        if keep:
            count = self.work["entry_size"]
            self.bank_images[self.next], self.bank_logits[self.next] = (
                images[:count],
                logits[:count],
            )
            self.next = (self.next + 1) % self.work["capacity"]

    def exact(self, images, logits, replayed, replayed_logits):
        """The gradient of L_acq(θ) + L_ret(θ'), θ' = θ − α ∇L_acq(θ), in the parameters' grad."""
        inner = torch.optim.SGD(self.student.parameters(), self.work["inner_lr"])
        with higher.innerloop_ctx(self.student, inner, copy_initial_weights=False) as (model, step):
            acquisition = distance(model(images)[0], logits)
            for index in range(self.work["inner_steps"]):
                loss = acquisition if index == 0 else distance(model(images)[0], logits)
                step.step(loss)
            retention = distance(model(replayed)[0], replayed_logits)
            (acquisition + retention).backward()

    def first_order(self, images, logits, replayed, replayed_logits):
        distance(self.student(images)[0], logits).backward()
        parameters = dict(self.student.named_parameters())
        adapted = parameters
        for index in range(self.work["inner_steps"]):
            if index:
                output = torch.func.functional_call(self.student, adapted, (images,))[0]
                slopes = torch.autograd.grad(distance(output, logits), list(adapted.values()))
            else:
                slopes = [p.grad for p in parameters.values()]
            adapted = {
                name: (p - self.work["inner_lr"] * g).detach().requires_grad_()
                for (name, p), g in zip(adapted.items(), slopes, strict=True)
            }
        output = torch.func.functional_call(self.student, adapted, (replayed,))[0]
        gradient = torch.autograd.grad(distance(output, replayed_logits), list(adapted.values()))
        for p, g in zip(parameters.values(), gradient, strict=True):
            p.grad += g

    def none(self, images, logits, replayed, replayed_logits):
        acquisition = distance(self.student(images)[0], logits)
        (acquisition + distance(self.student(replayed)[0], replayed_logits)).backward()

    def iteration(self):
        for _ in range(self.work["generator_steps"]):
            self.generator_step()
        for remaining in reversed(range(self.work["student_steps"])):
            self.student_step(keep=remaining == 0)


def main():
    keep_freed_memory()  # as dfkd_jax does
    description = json.loads(sys.stdin.readline())
    torch.set_num_threads(description["threads"])
    torch.backends.cuda.matmul.allow_tf32 = description["tf32"]
    torch.backends.cudnn.allow_tf32 = description["tf32"]
    torch.backends.cudnn.benchmark = True  # the fastest of its algorithms for each shape
    work = Work(description)
    print("{}", flush=True)
    clock = {"wall": time.perf_counter, "processor": time.process_time}[description["clock"]]
    for line in sys.stdin:
        task = getattr(work, line.strip())
        work.wait()
        started = clock()
        task()
        work.wait()
        print(json.dumps({"seconds": clock() - started}), flush=True)


if __name__ == "__main__":
    main()
