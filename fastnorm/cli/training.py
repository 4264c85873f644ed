"""One network trained twice at once, on the same batches, with the steps of the two in turns.

Whatever else the machine does hits both alike, so that their step times can be compared. Processes
that torchrun has started share each batch, and average their gradients.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastnorm
from fastnorm.cli.data import Images
from fastnorm.cli.measure import peak_memory, synchronize
from fastnorm.cli.models import FASTNORM, TORCH, Model
from fastnorm.cli.processes import ALONE, Processes
from fastnorm.cli.progress import Progress


@dataclass(frozen=True)
class Plan:
    """What to train, and how."""

    model: Model
    images: Images  # on the device to train on
    epochs: int
    batch_size: int
    lr: float
    seed: int
    dtype: torch.dtype  # bfloat16 is by autocast
    processes: Processes = ALONE
    sync_bn: bool = False  # fastnorm's batch statistics are of all processes' parts

    @property
    def device(self) -> torch.device:
        return self.images.train_images.device

    @property
    def steps_per_epoch(self) -> int:
        """Full batches only: a remainder of one image would have no variance to normalize by."""
        return len(self.images.train_labels) // self.batch_size


@dataclass(frozen=True)
class Epoch:
    """The test set after an epoch, and the mean loss of its training steps."""

    test_accuracy: float
    test_loss: float
    train_loss: float


@dataclass
class Run:
    """One of the two trainings: the network, its optimizer, and what was seen so far."""

    name: str
    model: nn.Module
    plan: Plan
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    peak_memory: int | None = None  # bytes of one forward and backward, see measure.py

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.plan.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        several = self.plan.processes.count > 1
        self.trained = DistributedDataParallel(self.model) if several else self.model
        steps = self.plan.epochs * self.plan.steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy, scores (count, classes))."""
        mixed = self.plan.dtype is not torch.float32
        with torch.autocast(self.plan.device.type, self.plan.dtype, enabled=mixed):
            scores = (self.trained if self.model.training else self.model)(images)
        return nn.functional.cross_entropy(scores.float(), labels), scores

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of this process's part of a batch; its share of the loss.

        The mean of all shares is the loss of the batch, and that of their gradients its gradient.
        """
        processes = self.plan.processes
        own = processes.part(labels)
        loss, _ = self.loss(processes.part(images), own)
        if processes.count > 1:
            loss = loss * (len(own) * processes.count / len(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One timed training step: forward, backward and update."""
        synchronize(self.plan.device)
        start = time.perf_counter()
        loss = self.gradients(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.plan.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(self.plan.processes.mean(loss.item()))
        self.schedule.step()

    @torch.no_grad()
    def finish_epoch(self) -> None:
        """Tests the network, in eval mode, and adds to `epochs`."""
        self.model.eval()
        labels = self.plan.images.test_labels
        loss, scores = self.loss(self.plan.images.test_images, labels)
        self.model.train()
        accuracy = (scores.argmax(1) == labels).double().mean()
        train_loss = fmean(self.losses[-self.plan.steps_per_epoch :])
        self.epochs.append(Epoch(accuracy.item(), loss.item(), train_loss))

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    @property
    def samples_per_second(self) -> float:
        return self.plan.batch_size / self.median_seconds


def start(plan: Plan) -> tuple[Run, Run]:
    """The torch.nn run and the fastnorm run, with the same initial weights."""
    torch.manual_seed(plan.seed)
    networks = [
        plan.model.build(layers, plan.images.shape, plan.images.classes).to(plan.device)
        for layers in (TORCH, FASTNORM)
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    if plan.sync_bn:
        networks[1] = fastnorm.SyncBatchNorm.convert_sync_batchnorm(networks[1])
    return Run(TORCH.name, networks[0], plan), Run(FASTNORM.name, networks[1], plan)


def batches(plan: Plan, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches; the order depends on `generator` alone, not on the device."""
    images, labels = plan.images.train_images, plan.images.train_labels
    order = torch.randperm(len(labels), generator=generator).to(plan.device)
    for index in range(plan.steps_per_epoch):
        chosen = order[index * plan.batch_size : (index + 1) * plan.batch_size]
        yield images[chosen], labels[chosen]


def train(plan: Plan, runs: Sequence[Run], progress: Progress) -> None:
    """Trains all `runs`, step by step in turns; who goes first changes with every step."""
    generator = torch.Generator().manual_seed(plan.seed)
    turns = list(runs)
    for _ in range(plan.epochs):
        for images, labels in batches(plan, generator):
            for run in turns:
                run.step(images, labels)
            turns.reverse()
            losses = ", ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs)
            progress.advance(f"loss {losses}")
        for run in runs:
            run.finish_epoch()
    for run in runs:
        run.peak_memory = peak_memory(partial(run.gradients, images, labels), plan.device)
