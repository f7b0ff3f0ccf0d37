"""Small modules that do what models do in the wild, each for one reason.

``ODD[name]`` is the class; an input is ``sample(name)(seed)`` and the loss is :func:`mean_square`
of the first tensor that comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from planner import Plan, optimize

WIDTH = 32


def normal(seed: int, *shape: int) -> Tensor:
    """Numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_square(output: Any) -> Tensor:
    """Mean of the squares of the first tensor in an output."""
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return first.pow(2).mean()


def plan_of(model: nn.Module, sample: Any = None, loss_fn: Any = mean_square) -> Plan:
    """Plan a module that takes one tensor, with a budget that is no limit."""
    sample = normal(0, 16, WIDTH) if sample is None else sample
    return optimize(model.train(), sample, budget_bytes=10**9, loss_fn=loss_fn)


class Three(nn.Module):
    """Three linear layers, to be used in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)
        self.prepare()

    def prepare(self) -> None:
        """What a subclass adds."""

    def forward(self, x: Tensor) -> Any:
        return self.c(F.gelu(self.b(F.gelu(self.a(x)))))


class BufferReplaced(Three):
    """Keeps an average in a buffer by assigning a new tensor."""

    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.c(F.relu(self.b(h - self.mean)))


class BufferDataReplaced(BufferReplaced):
    """The same through ``.data``, then written to in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.mean.data = 0.9 * self.mean.data + 0.1 * h.detach().mean(0)
        self.mean.mul_(2)
        return self.c(F.relu(self.b(h - self.mean)))


class BufferUpdated(BufferReplaced):
    """The same in place, read before and after."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        y = F.relu(self.b(h - self.mean))
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return self.c(y)


class Checkpointed(Three):
    """Recomputes by itself, dropout included."""

    def forward(self, x: Tensor) -> Tensor:
        def part(t: Tensor) -> Tensor:
            return F.dropout(torch.tanh(self.b(F.gelu(self.a(t)))), 0.2)

        x = checkpoint(part, x, use_reentrant=False)
        return self.c(checkpoint(part, x, use_reentrant=False))


class CheckpointedReentrant(Three):
    """The older implementation of the same."""

    def forward(self, x: Tensor) -> Tensor:
        def part(t: Tensor) -> Tensor:
            return F.dropout(self.b(F.gelu(self.a(t))), 0.2)

        return self.c(checkpoint(part, self.c(x), use_reentrant=True))


class InPlaceViews(Three):
    """Changes shapes in place: transpose_, unsqueeze_, squeeze_, t_."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        h.unsqueeze_(0).transpose_(0, 1).squeeze_(1).t_().t_()
        return self.c(F.gelu(self.b(h)))


class SlicesAssigned(Three):
    """Writes slices of an activation, some of which others read before."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        out = torch.zeros_like(h)
        out[:, :8] = h[:, 8:16]
        out[:, 8:] = torch.sin(self.b(x))[:, 8:]
        left, right = h[:, :16], h[:, 16:]
        left.mul_(2)
        y = torch.tanh(h)
        right.add_(1)
        return self.c(h + out) * y


class KeysInAnyOrder(Three):
    """Nested inputs, handed back with an output."""

    def forward(self, x: Tensor, *, extra: dict[str, Any], **more: Any) -> dict[str, Any]:
        h = self.a(x) + extra["masks"][0]
        h = F.relu(self.b(h)) + extra["masks"][1][0] * extra["masks"][1][1]
        return {"y": [self.c(h + more["last"]), h], "in": extra}


class ManyDropouts(Three):
    """Every kind of noise, so that masks are worth drawing again."""

    def prepare(self) -> None:
        self.alpha = nn.AlphaDropout(0.2)
        self.channels = nn.Dropout1d(0.2)
        self.in_place = nn.Dropout(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.channels(self.alpha(F.selu(self.a(x))))
        h = F.dropout(self.b(h), p=1.0) + self.in_place(self.b(h)) + torch.randn_like(h)
        return self.c(F.dropout(F.rrelu(h, training=True), 0.3))


class KeepsUnread(Three):
    """A tensor lies on it as a plain attribute and takes no part."""

    def prepare(self) -> None:
        weight = torch.linspace(0, 1, WIDTH * WIDTH).reshape(WIDTH, WIDTH)
        self.kept = weight  # nothing reads it


class AttributeReplaced(Three):
    """Keeps an average in a plain attribute, a vector that no buffer is, and what it saw last."""

    def prepare(self) -> None:
        self.mean, self.scale = torch.zeros(WIDTH), torch.ones(())
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.scale[None].clone()
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.scale.mul_(0.5)
        self.last = h.detach()
        return self.c(F.relu(self.b(h - self.mean)))


class Pruned(Three):
    """A hook makes the weight before each forward and keeps it in a plain attribute."""

    def prepare(self) -> None:
        prune.l1_unstructured(self.b, "weight", 0.3)


class Bags(nn.Module):
    """Embedding bags of each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(50, WIDTH, mode=mode) for mode in ("sum", "mean", "max")
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.head(sum(bag(tokens, offsets) for bag in self.bags))


class Factorized(Three):
    """A singular value decomposition and a QR decomposition."""

    def forward(self, x: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(self.a(x), full_matrices=False)
        q, r = torch.linalg.qr(self.b(x))
        return self.c((u * s) @ v) + q @ r


class Aliases(Three):
    """Inputs, parameters, views and detached tensors come back."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h = self.a(x)
        y = self.b(h)
        return y, x, self.c.weight, y[:, :5], y, y.t(), h.detach(), self.a.bias.view(4, 8), 3, None


class Square(torch.autograd.Function):
    """Keeps its input for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x * x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * x * gradients[0], None


class OwnFunction(Three):
    """Two custom autograd functions and a no_grad block."""

    def forward(self, x: Tensor) -> Tensor:
        h = Square.apply(self.a(x), 0.5)
        with torch.no_grad():
            scale = h.abs().amax(1, keepdim=True) + self.b(h).softmax(-1)
        return self.c(Square.apply(h / scale, 0.3)) * scale


class GradientPenalty(Three):
    """Differentiates inside forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = torch.tanh(self.b(torch.tanh(self.a(x)))).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return (gradient.norm(2, 1) - 1).pow(2).mean() + y * 1e-3


class Recurrences(nn.Module):
    """A bidirectional GRU, an RNN and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=True)
        self.rnn = nn.RNN(16, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.gru(x)[0])
        return y * self.cell(y[:, -1])[:, None]


class Spectral(Three):
    """Complex numbers and Fourier transforms."""

    def prepare(self) -> None:
        self.filter = nn.Parameter(torch.ones(WIDTH // 2 + 1, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.a(x)) * self.filter
        return self.c(torch.fft.irfft(f * f.abs(), n=WIDTH))


class SpectralNorm(Three):
    """Power iteration updates buffers in forward; hooks change an output."""

    def prepare(self) -> None:
        self.a = nn.utils.parametrizations.spectral_norm(self.a)
        self.b = nn.utils.parametrizations.weight_norm(self.b)
        self.c.register_forward_hook(lambda _module, _args, out: out * 2)


ODD: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        BufferReplaced,
        BufferDataReplaced,
        BufferUpdated,
        Checkpointed,
        CheckpointedReentrant,
        InPlaceViews,
        SlicesAssigned,
        KeysInAnyOrder,
        ManyDropouts,
        KeepsUnread,
        AttributeReplaced,
        Pruned,
        Bags,
        Factorized,
        Aliases,
        OwnFunction,
        GradientPenalty,
        Recurrences,
        Spectral,
        SpectralNorm,
    )
}


def sample(name: str) -> Callable[[int], Any]:
    """From a seed to an input of ``ODD[name]``."""
    if name == "Bags":
        tokens = torch.arange(40) * 7 % 50
        return lambda seed: ((tokens + seed) % 50, torch.tensor([0, 7, 15, 30]))
    if name == "Recurrences":
        return lambda seed: normal(seed, 4, 5, 8)
    if name == "KeysInAnyOrder":
        return lambda seed: {
            "x": normal(seed, 16, WIDTH),
            "last": normal(seed + 1, 16, WIDTH),
            "extra": {"masks": [normal(seed + 2, 16, WIDTH), (torch.ones(WIDTH), 2)], "flag": True},
        }
    return lambda seed: normal(seed, 16, WIDTH)
