"""The subjects of the operator sweep: PyTorch's own samples of operators and modules.

Each sample becomes a model whose tensor arguments are activations: parameters that hold
the sample's own values, multiplied by one twice. The results are flattened, joined and
passed through a sigmoid, so that their strides matter to later calls.
"""

from __future__ import annotations

import random
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

LAYOUTS = ("contiguous", "transposed", "reversed", "channels_last", "in_place")

SIZES = {"XS": 5, "S": 16, "M": 24, "L": 40}
"""Sizes for PyTorch's samples, larger than its own (3, 5, 10, 20), so that bytes matter."""

_LARGEST_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Case:
    """One step of the sweep, by name.

    Parameters
    ----------
    kind
        ``"operator"`` or ``"module"``.
    name
        As in PyTorch's database, including the variant.
    sample
        Rank of the sample: 0 is the largest.
    layout
        Memory layout of the arguments, or that the operator writes into its argument.
    """

    kind: str
    name: str
    sample: int
    layout: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} #{self.sample} {self.layout}"


class NoCase(Exception):
    """The sample does not train in this layout, with or without a plan."""


class Subject(nn.Module):
    """A call between two layers.

    Parameters
    ----------
    call
        Takes the arguments, nested as in the sample.
    tree
        Arguments; tensors that require grad become activations, the others buffers.
    layout
        One of :data:`LAYOUTS`.
    """

    def __init__(self, call: Any, tree: Any, layout: str) -> None:
        super().__init__()
        leaves, self._spec = tree_flatten(tree)
        self._call = [call] if not isinstance(call, nn.Module) else None  # a list: not a submodule
        self.inner = call if isinstance(call, nn.Module) else None
        self.values = nn.ParameterList()
        self._leaves: list[Any] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.values.append(nn.Parameter(_laid_out(leaf.detach().clone(), layout)))
                self._leaves.append(("value", len(self.values) - 1))
            elif isinstance(leaf, Tensor):
                self.register_buffer(f"given_{i}", leaf.detach().clone())
                self._leaves.append(("given", f"given_{i}"))
            else:
                self._leaves.append(("plain", leaf))
        if not len(self.values):
            raise NoCase("no argument requires grad")
        self.first = nn.Parameter(torch.ones(()))
        self.second = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
        return _joined(self.called(*(v * self.first * (self.second * x) for v in self.values)))

    def called(self, *values: Tensor) -> Any:
        """The result of the call with ``values`` in place of the parameters."""
        made = []
        for kind, what in self._leaves:
            if kind == "value":
                made.append(values[what])
            else:
                made.append(getattr(self, what) if kind == "given" else what)
        call = self.inner if self._call is None else self._call[0]
        return call(*tree_unflatten(made, self._spec))


def _joined(result: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The differentiable part of a result as one vector, and the strides of all its tensors."""
    parts, strides = [], []
    for t in tree_leaves(result):
        if isinstance(t, Tensor):
            strides.append(strides_of(t))
            if t.requires_grad:
                t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
                parts.append(torch.sigmoid(t).flatten())
    if not parts:
        raise NoCase("nothing that it returns can be differentiated")
    return torch.cat(parts), strides


def strides_of(t: Tensor) -> tuple[int, ...]:
    """The strides without those of dimensions of one element, which no kernel uses."""
    return tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "reversed" and t.dim() >= 3:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and t.dim() in (4, 5):
        last = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
        return t.contiguous(memory_format=last)
    return t.contiguous()


def loss_of(output: tuple[Tensor, list[tuple[int, ...]]]) -> Tensor:
    """What the training loop computes from a subject's output."""
    return output[0].square().mean()


# -- PyTorch's databases ------------------------------------------------------------------


@cache
def _databases() -> tuple[dict[str, Any], dict[str, Any]]:
    """Operators and modules by name."""
    if "expecttest" not in sys.modules:
        # PyTorch's testing code derives a class from this one of a package that nothing here needs.
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as invocations
        from torch.testing._internal import common_utils
        from torch.testing._internal.common_modules import module_db
        from torch.testing._internal.opinfo import core
    # Samples look through the stack for a test of PyTorch's own, and write the stack down for each
    # kind of device that they seed, which took most of the time.
    common_utils.extract_test_fn = core.extract_test_fn = lambda: None
    common_utils.set_rng_seed = _seed_the_cpu
    # Of operators that draw numbers PyTorch's tests seed the generator in each call.
    invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    operators = {
        f"{op.name}{'.' + op.variant_test_name if op.variant_test_name else ''}": op
        for op in invocations.op_db
        if op.supports_autograd and torch.float32 in op.dtypes
    }
    return operators, {info.name: info for info in module_db}


def _seed_the_cpu(seed: int = 1234) -> None:
    """Seed what draws samples, all of which are made on the CPU."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@contextmanager
def _larger_samples() -> Iterator[None]:
    """While active, samples are made with :data:`SIZES`."""
    parts = [m for n, m in sys.modules.items() if n.startswith("torch.testing._internal.")]
    changed: list[tuple[Any, str, Any]] = []
    for part in parts:
        for name, size in SIZES.items():
            if isinstance(vars(part).get(name), int):
                changed.append((part, name, getattr(part, name)))
                setattr(part, name, size)
    try:
        yield
    finally:
        for part, name, size in changed:
            setattr(part, name, size)


def all_cases(num_samples: int) -> list[Case]:
    """Every operator and module, with ``num_samples`` of each in every layout.

    Whether a case exists is known only when it is built.
    """
    operators, modules = _databases()
    names = [("operator", n) for n in operators] + [("module", n) for n in modules]
    return [
        Case(kind=kind, name=name, sample=i, layout=layout)
        for kind, name in names
        for i in range(num_samples)
        for layout in LAYOUTS
        if kind == "operator" or layout != "in_place"
    ]


def some_cases(num: int, seed: int) -> list[Case]:
    """A seeded selection, for a test suite."""
    return sorted(random.Random(seed).sample(all_cases(1), num))


def subject_of(case: Case) -> Callable[[], Subject]:
    """Return a function that builds the case's model, the same one each time.

    Raises
    ------
    NoCase
        When there is no such sample, or it does not differ from the contiguous one.
    """
    made = _operator(case) if case.kind == "operator" else _module(case)
    for larger in (True, False):
        try:
            build = made(larger)
            build()
            return build
        except NoCase:
            raise
        except Exception as error:  # noqa: BLE001 - sizes that must be PyTorch's own raise anything
            failure = error
    raise NoCase(f"its samples cannot be made: {failure}")


def arguments_of(case: Case) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The bare call of an operator's case, and the arguments by which it is differentiated.

    Raises
    ------
    NoCase
        As :func:`subject_of`.
    """
    subject = subject_of(case)()
    return subject.called, tuple(subject.values)


def _operator(case: Case) -> Callable[[bool], Callable[[], Subject]]:
    op = _databases()[0][case.name]
    call = op.op
    if getattr(torch, case.name, None) is call:  # by its name, as users call it
        call = lambda *args, **kwargs: getattr(torch, case.name)(*args, **kwargs)  # noqa: E731
    if case.layout == "in_place":
        if op.inplace_variant is None:
            raise NoCase("it has no in-place variant")
        call = op.inplace_variant

    def made(larger: bool) -> Callable[[], Subject]:
        samples = _ranked(
            lambda: [
                s
                for s in op.sample_inputs("cpu", torch.float32, requires_grad=True)
                if not (case.layout == "in_place" and s.broadcasts_input)
            ],
            lambda s: (s.input, s.args, s.kwargs),
            larger,
        )
        if case.sample >= len(samples):
            raise NoCase("no such sample")
        sample = samples[case.sample]
        tree = ((sample.input, *sample.args), dict(sample.kwargs))
        if not _matters(tree, case.layout):
            raise NoCase("no argument lies differently")

        def run(args: Any, kwargs: Any) -> Any:
            return sample.output_process_fn_grad(call(*args, **kwargs))

        return lambda: Subject(run, tree, case.layout)

    return made


def _module(case: Case) -> Callable[[bool], Callable[[], Subject]]:
    info = _databases()[1][case.name]

    def made(larger: bool) -> Callable[[], Subject]:
        samples = _ranked(
            lambda: info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
            ),
            lambda s: (s.forward_input.args, s.forward_input.kwargs),
            larger,
        )
        samples = [s for s in samples if s.forward_input is not None]
        if case.sample >= len(samples):
            raise NoCase("no such sample")
        made_of, given = samples[case.sample].constructor_input, samples[case.sample].forward_input
        tree = (tuple(given.args), dict(given.kwargs))
        if not _matters(tree, case.layout):
            raise NoCase("no argument lies differently")

        class Called(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.subject = info.module_cls(*made_of.args, **made_of.kwargs).train()
                if any(map(is_lazy, self.subject.parameters())):
                    with torch.no_grad():  # its first call makes the parameters
                        self.subject(*given.args, **given.kwargs)

            def forward(self, args: Any, kwargs: Any) -> Any:
                return self.subject(*args, **kwargs)

        return lambda: Subject(Called(), tree, case.layout)

    return made


def _ranked(samples: Callable[[], Any], tree_of: Callable[[Any], Any], larger: bool) -> list[Any]:
    """Samples, the one with the most elements first; of equals, PyTorch's order."""
    _seed_the_cpu(0)
    if larger:
        with _larger_samples():
            found = list(samples())
    else:
        found = list(samples())

    def elements(sample: Any) -> int:
        tensors = [t for t in tree_leaves(tree_of(sample)) if isinstance(t, Tensor)]
        num = sum(t.numel() for t in tensors)
        return num if num <= _LARGEST_ELEMENTS else -num

    return sorted(found, key=elements, reverse=True)


def _matters(tree: Any, layout: str) -> bool:
    """Whether a layout makes a difference to the tensors that are differentiated."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad]
    if layout in ("contiguous", "in_place"):
        return True
    return any(_laid_out(t.detach(), layout).stride() != t.contiguous().stride() for t in tensors)
