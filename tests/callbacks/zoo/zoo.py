"""Small modules and optimizers of the kinds that people train, and how a test trains them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

PATTERN = r"(?P<group>layers\.\d)\.weight"
STEPS = 12


class Remember(Logger):
    """Keeps every row in memory."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)


# ------------------------------------------------------------------------------------------------------- modules


class Plain(LightningModule):
    """Two layers; what all others derive from."""

    pattern = PATTERN

    def __init__(self, optimizer: Callable[[LightningModule], Any] | None = None) -> None:
        super().__init__()
        self.make = optimizer or (lambda module: AdamW(trained(module), lr=1e-2, weight_decay=0.1))
        self.build()

    def build(self) -> None:
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out

    def batch_loss(self, batch: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make(self)


class Tied(Plain):
    """One weight in two places."""

    def build(self) -> None:
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.layers[2].weight = self.layers[0].weight


class Frozen(Plain):
    """The first layer is not trained."""

    def build(self) -> None:
        super().build()
        self.layers[0].requires_grad_(False)


class LowRank(Plain):
    """A frozen weight and a product of two thin ones beside it."""

    pattern = r"(?P<group>down|up)$"

    def build(self) -> None:
        super().build()
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6) * 0.3), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](torch.tanh(self.layers[0](x) + x @ self.down.T @ self.up.T))


class BatchNorm(Plain):
    """Has buffers that a forward writes."""

    def build(self) -> None:
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class Recurrent(Plain):
    """A recurrent network."""

    pattern = r"(?P<group>rnn|head)\.weight"

    def build(self) -> None:
        self.rnn, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 3, 2))[0][:, -1])


class Checkpointed(Plain):
    """Computes a layer again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.layers[0], x, use_reentrant=False)
        return self.layers[2](torch.tanh(hidden))


class Parametrized(Plain):
    """A weight that is a function of another."""

    pattern = r"(?P<group>layers\.\d)\.(?:weight|parametrizations)"

    def build(self) -> None:
        super().build()
        nn.utils.parametrizations.weight_norm(self.layers[0])


class Drawing(Plain):
    """Dropout, and a loss that draws from numpy and from Python's own generator."""

    def batch_loss(self, batch: Sequence[Tensor]) -> Tensor:
        x = batch[0] * (1.0 + 0.1 * np.random.rand())
        return F.cross_entropy(self(F.dropout(x, 0.2, self.training)), batch[1]) * (1.0 + 0.1 * random.random())


class Sparse(Plain):
    """A table of which a batch touches some rows, with sparse gradients."""

    pattern = r"(?P<group>table)\.weight"

    def build(self) -> None:
        self.table, self.head = nn.Embedding(8, 6, sparse=True), nn.Linear(6, 3)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        row = ((x[:, :3] > 0) * torch.tensor([1, 2, 4])).sum(1)
        out: Tensor = self.head(self.table(row))
        return out


class Complex(Plain):
    """A complex weight."""

    def build(self) -> None:
        first = nn.Linear(6, 8, bias=False, dtype=torch.complex64)
        self.layers = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[2](torch.tanh(self.layers[0](x.to(torch.complex64)).abs()))
        return out


class Pieces(Plain):
    """An empty parameter, and one of no dimension."""

    pattern = r"(?P<group>layers\.\d|rest|scale)"

    def build(self) -> None:
        super().build()
        self.rest, self.scale = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Pruned(Plain):
    """A weight that is masked from the beginning."""

    def build(self) -> None:
        super().build()
        prune.l1_unstructured(self.layers[0], "weight", 0.3)


class Manual(Plain):
    """Adds up the gradients of some batches by itself."""

    parts = 2

    def __init__(self, optimizer: Callable[[LightningModule], Any] | None = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.batch_loss(batch) / self.parts)
        if batch_idx % self.parts == self.parts - 1:
            optimizer.step()
            optimizer.zero_grad()


class TwoPasses(Manual):
    """Two backward passes of one batch before each step."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for part in (0.3, 0.7):
            self.manual_backward(part * self.batch_loss(batch))
        optimizer.step()


class CompiledStep(Plain):
    """The optimizer's `step` goes through `torch.compile`."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer


class Grows(Plain):
    """The first layer is frozen for an epoch, and then a parameter group with a decay of its own."""

    def configure_optimizers(self) -> Any:
        self.layers[0].requires_grad_(False)
        return super().configure_optimizers()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            first = list(self.layers[0].requires_grad_(True).parameters())
            self.trainer.optimizers[0].add_param_group({"params": first, "weight_decay": 0.5})


class TiedAcross(Plain):
    """One weight in two layers that the pattern calls two groups."""

    pattern = r"(?P<group>inner|outer)\.weight"

    def build(self) -> None:
        self.inner, self.outer, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))
        return out


class Quantised(Plain):
    """Holds integers as a frozen parameter."""

    def build(self) -> None:
        super().build()
        self.levels = nn.Parameter(torch.arange(6, dtype=torch.int8), requires_grad=False)


class OnMeta(Plain):
    """Has no values until the run configures it."""

    def build(self) -> None:
        with torch.device("meta"):
            super().build()

    def configure_model(self) -> None:
        if self.layers[0].weight.is_meta:
            self.to_empty(device="cpu")
            for p in self.parameters():
                nn.init.normal_(p, std=0.3)


class Spectral(Plain):
    """A forward in training moves the buffers of a power iteration."""

    pattern = r"(?P<group>layers\.\d)\.(?:weight|parametrizations)"

    def build(self) -> None:
        super().build()
        nn.utils.parametrizations.spectral_norm(self.layers[0])


class Several(Plain):
    """A batch from each of two loaders."""

    def batch_loss(self, batch: Any) -> Tensor:
        return super().batch_loss(batch["a"]) + super().batch_loss(batch["b"])


class Gan(Plain):
    """Two networks, two optimizers; the second network takes as many steps on each batch as `ratio` says."""

    pattern = r"(?P<group>generator)\.weight"
    ratio = 1
    generator_first = False

    def __init__(self, optimizer: Callable[[LightningModule], Any] | None = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def build(self) -> None:
        self.generator, self.critic = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        both: Any = self.optimizers()
        generator, critic = both
        turns = [self.turn_generator] + [self.turn_critic] * self.ratio
        for turn in turns if self.generator_first else turns[::-1]:
            turn(batch[0], critic if turn == self.turn_critic else generator)

    def turn_generator(self, x: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(F.softplus(-self.critic(self.generator(x[:, :4]))).mean())
        optimizer.step()

    def turn_critic(self, x: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        # Not detached: the generator gets gradients of a loss that is not its own.
        fake, real = self.critic(self.generator(x[:, :4])), self.critic(x)
        self.manual_backward((F.softplus(fake) + F.softplus(-real)).mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            AdamW(self.generator.parameters(), lr=1e-2, weight_decay=0.1),
            AdamW(self.critic.parameters(), lr=3e-2, weight_decay=0.5),
        ]


# ---------------------------------------------------------------------------------------------------- optimizers


class Sharp(Optimizer):
    """Sharpness-aware: the gradient at perturbed weights moves the weights (arXiv 2010.01412)."""

    def __init__(self, params: Iterable[Tensor], rho: float = 0.3, **settings: Any) -> None:
        self.rho, self.inner = rho, AdamW(params, **settings)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> None:
        self.old = [(p, p.clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in self.old]).norm()
        for p, _ in self.old:
            p.add_(p.grad * (self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def second_step(self) -> None:
        for p, old in self.old:
            p.copy_(old)
        self.old = []
        self.inner.step()


class Silent(Optimizer):
    """Plain descent that takes no notice of a closure, and has no learning rate in its groups."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"size": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["size"])


class Lookahead(Optimizer):
    """Steps another optimizer, and every third time goes half of the way back."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.slow = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]
        self.taken = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.taken += 1
        if self.taken % 3 == 0:
            with torch.no_grad():
                for group, slow in zip(self.param_groups, self.slow, strict=True):
                    for p, held in zip(group["params"], slow, strict=True):
                        held.lerp_(p, 0.5)
                        p.copy_(held)
        return loss


class Lion(Optimizer):
    """Signs of a momentum, decoupled decay (arXiv 2302.06675)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = asked(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(torch.lerp(p.grad, momentum, group["betas"][0]).sgn(), alpha=group["lr"])
                    momentum.lerp_(p.grad, 1 - group["betas"][1])
        return loss


class ScheduleFree(Optimizer):
    """AdamW whose weights lie between those that step and their average (arXiv 2405.15682), decay at the former."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        settings = {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay, "eps": 1e-8, "taken": 0}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = asked(closure)
        for group in self.param_groups:
            group["taken"] += 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"], state["square"] = p.clone(), torch.zeros_like(p)
                z, square = state["z"], state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2 ** group["taken"])).sqrt() + group["eps"]
                move = p.grad / root + group["weight_decay"] * p
                average = (p - (1 - beta1) * z) / beta1
                z.sub_(move, alpha=group["lr"])
                average.lerp_(z, 1 / group["taken"])
                p.copy_(torch.lerp(z, average, beta1))
        return loss


class Trusted(Optimizer):
    """The whole step, decay included, is as long as a share of the weights (as LARS and LAMB have it)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = asked(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    move = p.grad + group["weight_decay"] * p
                    p.sub_(move * (group["lr"] * p.norm() / (move.norm() + 1e-12)))
        return loss


class Derived(AdamW):
    """Has Adam's settings and a rule of its own: signs, and twice the decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = asked(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - 2 * group["lr"] * group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])
        return loss


def asked(closure: Any) -> Any:
    """Call a closure, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# ------------------------------------------------------------------------------------------------------ training


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


class Stream(IterableDataset[Any]):
    """Seven samples, of which nobody knows how many they are."""

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(3)
        for _ in range(7):
            x = torch.randn(6, generator=generator)
            yield x, x[:3].argmax()


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(), 2)


def batches() -> DataLoader[Any]:
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8, shuffle=True)


def fit(
    module: Callable[[], LightningModule],
    callbacks: Sequence[Callback],
    folder: Path,
    data: Callable[[], Any] = batches,
    **settings: Any,
) -> tuple[LightningModule, dict[int, dict[str, float]], list[Any]]:
    """Train from fixed seeds: the module, the logged rows, and every random state afterwards."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model, log = module(), Remember()
    defaults: dict[str, Any] = {"max_steps": STEPS, "max_epochs": -1, "enable_checkpointing": False, "logger": log}
    defaults["accelerator"] = "cpu"
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(callbacks=list(callbacks), default_root_dir=folder, **quiet, **{**defaults, **settings})
    trainer.fit(model, data())
    return model, log.rows, [torch.get_rng_state(), np.random.get_state(), random.getstate()]
