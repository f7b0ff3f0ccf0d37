"""Give a model the shapes of one tensor-parallel rank, by a plan that names its matrices.

The plan is the one that Transformers' configurations carry (``base_model_tp_plan``), or the
caller's: paths of modules, ``*`` for a number, and how each is divided. The scheme is Megatron-LM's
(Shoeybi et al. 2019, arXiv:1909.08053): a *column-parallel* matrix makes a part of the
features on each rank, a *row-parallel* one reads such a part, and its outputs are summed over
the ranks. Whatever lies between the two is smaller by itself, since it works on what it is
given. So the model is captured with divided matrices, and no figure is divided afterwards: a
model whose code insists on its undivided sizes cannot be captured, which names the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Style = Literal["colwise", "rowwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise"]

_COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
_GATHERED = ("colwise_gather_output", "colwise_rep")
STYLES = (*_COLUMNS, "rowwise", "embedding_rowwise")


def find_tp_plan(model: nn.Module, given: Mapping[str, str] | None) -> dict[str, str]:
    """Return the style of each module by its path.

    Parameters
    ----------
    given
        The caller's plan; ``None`` for the one that the model carries.

    Raises
    ------
    ValueError
        When there is none, or it names what is not there or cannot be divided.
    """
    plan = getattr(model, "tp_plan", None) if given is None else given
    if not plan:
        raise ValueError(
            f"{type(model).__name__} does not say how its matrices are divided (Transformers' "
            "models have base_model_tp_plan in their configuration): name them in tp_plan=, say "
            "{'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}"
        )
    found: dict[str, str] = {}
    paths = [path for path, _ in model.named_modules() if path]
    for pattern, style in plan.items():
        one = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        matching = [path for path in paths if one.fullmatch(path)]
        if not matching and given is not None:
            raise ValueError(f"tp_plan names {pattern!r}, and {type(model).__name__} has none such")
        if matching and style not in STYLES:
            raise ValueError(
                f"{pattern!r} is divided as {style!r}, which is not estimated; known are "
                f"{', '.join(STYLES)}: leave it out of tp_plan= to have it whole on each rank"
            )
        found |= dict.fromkeys(matching, style)
    if not found:
        raise ValueError(
            f"the tensor-parallel plan of {type(model).__name__} names no module of it: give one "
            "in tp_plan="
        )
    return found


def divide(model: nn.Module, styles: Mapping[str, str], ranks: int) -> None:
    """Give the named modules of a model on ``meta`` the shapes of one rank.

    Raises
    ------
    ValueError
        When one is no ``nn.Linear`` (or ``nn.Embedding``), or does not divide.
    """
    done: dict[int, nn.Parameter] = {}
    for path, style in styles.items():
        module = model.get_submodule(path)
        if style == "embedding_rowwise":
            if type(module) is not nn.Embedding:
                raise _not_one(path, module, style, "nn.Embedding")
            module.weight = _part(path, module.weight, 0, ranks, done)
            continue
        if type(module) is not nn.Linear:
            raise _not_one(path, module, style, "nn.Linear")
        if style == "rowwise":
            module.weight = _part(path, module.weight, 1, ranks, done)
            module.in_features //= ranks
            continue
        module.weight = _part(path, module.weight, 0, ranks, done)
        if module.bias is not None:
            module.bias = _part(path, module.bias, 0, ranks, done)
        module.out_features //= ranks
        if style in _GATHERED:
            _gather(module, module.out_features * ranks)


class _Gathering(nn.Linear):
    """A column-parallel matrix whose parts are gathered: memory as of an all-gather.

    Padding makes a tensor of all features beside the part, and its gradient's part is cut out.
    """

    all_features: int

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, and make room for the other ranks' features."""
        part = super().forward(input)
        return nn.functional.pad(part, (0, self.all_features - part.shape[-1]))


def _gather(module: nn.Linear, all_features: int) -> None:
    """Make a divided matrix one whose parts are gathered."""
    module.__class__ = _Gathering
    module.__dict__["all_features"] = all_features


def _not_one(path: str, module: nn.Module, style: str, kind: str) -> ValueError:
    return ValueError(
        f"{path!r} is divided as {style!r}, which needs an {kind}, and it is a "
        f"{type(module).__name__}: leave it out of tp_plan= to have it whole on each rank"
    )


def _part(
    path: str, whole: Tensor, dim: int, ranks: int, done: dict[int, nn.Parameter]
) -> nn.Parameter:
    """Return an empty parameter of one rank's size; the same one for tied parameters."""
    if id(whole) in done:
        return done[id(whole)]
    if any(whole is part for part in done.values()):  # a tied one that was divided already
        assert isinstance(whole, nn.Parameter)
        return whole
    if whole.shape[dim] % ranks:
        raise ValueError(
            f"{path!r} has {whole.shape[dim]} features, which {ranks} tensor-parallel ranks do not "
            "divide: choose another tp"
        )
    shape = list(whole.shape)
    shape[dim] //= ranks
    part = nn.Parameter(torch.empty(shape, dtype=whole.dtype, device="meta"), whole.requires_grad)
    done[id(whole)] = part
    return part


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A sum or a gathering over the tensor-parallel ranks, in one call of the model.

    Parameters
    ----------
    kind
        ``"all_reduce"`` or ``"all_gather"``.
    phase
        ``"forward"`` or ``"backward"``.
    path
        The module that it belongs to.
    num_bytes
        Of the whole tensor.
    """

    kind: Literal["all_reduce", "all_gather"]
    phase: Literal["forward", "backward"]
    path: str
    num_bytes: int


@dataclass
class Collectives:
    """The collectives of one call, collected while the call runs."""

    _forward: dict[str, Collective] = field(default_factory=dict)
    _backward: dict[str, tuple[int, Collective]] = field(default_factory=dict)

    @property
    def found(self) -> tuple[Collective, ...]:
        """Of the last call.

        Modules beside each other that read the same tensor share the sum of its gradient.
        """
        shared = {
            (path.rpartition(".")[0], place): each for path, (place, each) in self._backward.items()
        }
        return (*self._forward.values(), *shared.values())

    @property
    def largest_bytes(self) -> int:
        """Of one sum: its result lies beside its parts for a while."""
        sums = (each.num_bytes for each in self.found if each.kind == "all_reduce")
        return max(sums, default=0)

    @contextmanager
    def watching(self, model: nn.Module, styles: Mapping[str, str]) -> Iterator[None]:
        """Note what divided modules are called with while the context lasts."""
        handles = [
            model.get_submodule(path).register_forward_hook(self._noting(path, style))
            for path, style in styles.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, path: str, style: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if style in _GATHERED or style not in _COLUMNS:
                self._forward[path] = Collective(
                    kind="all_gather" if style in _GATHERED else "all_reduce",
                    phase="forward",
                    path=path,
                    num_bytes=_num_bytes(output),
                )
            if style in _COLUMNS and args[0].requires_grad:
                summed = Collective(
                    kind="all_reduce", phase="backward", path=path, num_bytes=_num_bytes(args[0])
                )
                self._backward[path] = id(args[0]), summed

        return note


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
