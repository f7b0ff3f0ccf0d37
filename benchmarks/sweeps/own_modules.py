"""Modules as users write them, each for one feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 32


class Swish(torch.autograd.Function):
    """A custom Function that saves its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Stack(nn.Module):
    """Four linear layers and a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(layer(x))
        return x


class OwnCheckpoint(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda x, f=layer: F.dropout(F.gelu(f(x)), 0.2), x, use_reentrant=False)
        return x


class StochasticDepth(Stack):
    """Whole layers are skipped, row by row: a mask and no branch."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            keep = (torch.rand(len(x), 1) < 0.8).to(x.dtype)
            x = x + keep / 0.8 * F.gelu(layer(x))
        return x


class BranchingDepth(Stack):
    """Whole layers are skipped by a branch on a random number."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(1).item() < 0.8:
                x = x + F.gelu(layer(x))
        return x


class PackedLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True, num_layers=2, dropout=0.1)
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(hidden)


class PlainRnn(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class RoutedExperts(nn.Module):
    """Each expert gets the rows routed to it, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == i)
            out = out.index_add(0, rows, weights[rows, slots, None] * expert(x[rows]))
        return out


class DenseExperts(RoutedExperts):
    """Every expert sees every row."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, i, None] * e(x) for i, e in enumerate(self.experts))  # type: ignore[return-value]


class PhysicsInside(nn.Module):
    """A loss inside forward, with the derivative of the output with respect to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (g[:, 0] - g[:, 1]).pow(2).mean() + u.pow(2).mean()


class SmallUnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm(self.down1(x)))
        return self.out(torch.cat([a, self.up(F.silu(self.down2(a)))], dim=1))


class ConformerCtc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + F.silu(self.depthwise(self.norm2(x).mT)).mT
        log_p = self.head(x).log_softmax(-1).transpose(0, 1)
        frames = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        return F.ctc_loss(log_p, targets, frames, lengths, zero_infinity=True)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 16), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        return F.mse_loss(self.decoder(z), x) + 1e-3 * divergence


class DistributionVae(Vae):
    """The same with torch.distributions."""

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encoder(x).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        z = posterior.rsample()
        divergence = torch.distributions.kl_divergence(posterior, prior).sum()
        return F.mse_loss(self.decoder(z), x) + 1e-3 * divergence


class Vq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.codes = nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        nearest = torch.cdist(z, self.codes.weight).argmin(-1)
        q = self.codes(nearest)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return loss + F.mse_loss(self.decoder(z + (q - z).detach()), x)


class GaussianProcess(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.net = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        f = self.net(x) * self.log_scale.exp()
        kernel = torch.exp(-0.5 * torch.cdist(f, f).pow(2)) + 0.1 * torch.eye(len(x))
        factor = torch.linalg.cholesky(kernel)
        alpha = torch.cholesky_solve(y[:, None], factor)
        return 0.5 * (y[:, None] * alpha).sum() + factor.diagonal().log().sum()


class FourierOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv1d(2, 16, 1), nn.Conv1d(16, 1, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 8, dtype=torch.cfloat) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        for _ in range(2):
            spectrum = torch.fft.rfft(h)
            kept = torch.einsum("bim,iom->bom", spectrum[..., :8], self.weight)
            spectrum = torch.cat([kept, torch.zeros_like(spectrum[..., 8:])], -1)
            h = F.gelu(torch.fft.irfft(spectrum, n=h.shape[-1]) + h)
        return self.head(h)


class Spectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(1, 1, 9, padding=4)
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(x[:, None]).squeeze(1)
        s = torch.stft(y, 32, hop_length=16, window=self.window, return_complex=True)
        return s.abs().clamp_min(1e-5).log().mean()


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


class MaskedLoss(Stack):
    """A loss over the rows that a mask of the input picks."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x)[mask].pow(2).mean()


class LoggedNorm(Stack):
    """Keeps a number for a log."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.last_norm = y.detach().norm().item()
        return y


class FiniteAssert(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        assert torch.isfinite(y).all()
        return y


class Deq(nn.Module):
    """A fixed point found without gradients, then one step with."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(6):
                z = torch.tanh(0.3 * self.f(z) + x)
        return torch.tanh(0.3 * self.f(z) + x)


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)
