"""What we rely on of calls: operators, tensors, modes and stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graph_capture.private_torch import (
    aten,
    dispatch,
    fake_tensors,
    operators,
    tensors,
    trees,
)

from .subjects import ADD, Heard

NESTED: Any = {"a": [1, 2], "b": (3,)}


class _Function(torch.overrides.TorchFunctionMode):
    pass


class _Loud(torch.Tensor):
    """Any function on it fails."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def _fake() -> Any:
    return fake_tensors.FakeTensorMode().from_tensor(torch.ones(2, 3))


def _raises(error: type[Exception], operator: Any) -> bool:
    fake = _fake()
    with pytest.raises(error), fake.fake_mode:
        operator(fake)
    return True


def _under(guard: Callable[[], Any]) -> bool:
    with guard():
        return not (torch.ones(1, requires_grad=True) * 2).requires_grad


def _hears_nothing(guard: Callable[[], Any]) -> bool:
    with Heard() as heard, guard():
        torch.ones(1) + 1
    return heard.calls == []


def _silent(guard: Callable[[], Any]) -> bool:
    loud = torch.ones(1).as_subclass(_Loud)
    with guard():
        return torch.add(loud, 1) is not None


def _modes_inside() -> bool:
    with Heard() as heard:
        return dispatch.current_dispatch_modes() == [heard]


def _function_modes_inside() -> bool:
    with _Function() as mode:
        at = dispatch.num_function_modes() - 1
        return dispatch.function_mode_at(at) is mode


def _casts_nothing() -> bool:
    with torch.autocast("cpu", dtype=torch.bfloat16), dispatch.without_autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def _library_ends() -> bool:
    with operators.temporary_library("remat_door_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        inside = hasattr(torch.ops.remat_door_test, "twice")
    return inside


def _written() -> int:
    tensor = torch.ones(1)
    before = tensors.version_of(tensor)
    tensor.add_(1)
    return tensors.version_of(tensor) - before


def _passes_for_parameter() -> bool:
    fake = _fake()
    fake_tensors.pass_for_parameter(fake)
    return isinstance(fake, nn.Parameter)


TREE = trees.tree_flatten(NESTED)[1]

QKV = (torch.ones(1, 1, 2, 4),) * 3


CHECKS: dict[str, Callable[[], Any]] = {
    "trees.TreeSpec": lambda: isinstance(TREE, trees.TreeSpec),
    "trees.tree_flatten": lambda: trees.tree_flatten(NESTED)[0] == [1, 2, 3],
    "trees.tree_flatten_with_path": lambda: (
        [(p[0].key, v) for p, v in trees.tree_flatten_with_path(NESTED)[0]]
        == [("a", 1), ("a", 2), ("b", 3)]
    ),
    "trees.tree_iter": lambda: list(trees.tree_iter(NESTED)) == [1, 2, 3],
    "trees.tree_leaves": lambda: trees.tree_leaves(NESTED) == [1, 2, 3],
    "trees.tree_map": lambda: trees.tree_map(str, NESTED) == {"a": ["1", "2"], "b": ("3",)},
    "trees.tree_unflatten": lambda: trees.tree_unflatten([1, 2, 3], TREE) == NESTED,
    "tensors.identity_of_storage": lambda: (
        tensors.identity_of_storage((x := torch.ones(4)).untyped_storage())
        == tensors.identity_of_storage(x[1:].untyped_storage())
    ),
    "tensors.version_of": lambda: _written() == 1,
    "tensors.is_zero_tensor": lambda: (
        tensors.is_zero_tensor(torch._efficientzerotensor(2))
        and not tensors.is_zero_tensor(torch.zeros(2))
    ),
    "tensors.negated_view": lambda: tensors.negated_view(torch.ones(2)).is_neg(),
    "operators.OpOverload": lambda: isinstance(ADD, operators.OpOverload),
    "operators.OpOverloadPacket": lambda: isinstance(
        torch.ops.aten.add, operators.OpOverloadPacket
    ),
    "operators.schema_of": lambda: operators.schema_of(ADD).name == "aten::add",
    "operators.overload_name_of": lambda: (
        operators.overload_name_of(ADD) == "Tensor"
        and operators.overload_name_of(torch.ops.aten.relu.default) == "default"
    ),
    "operators.packet_of": lambda: operators.packet_of(ADD) is torch.ops.aten.add,
    "operators.has_kernel": lambda: operators.has_kernel("aten::mm", "CPU"),
    "operators.temporary_library": _library_ends,
    "operators.qualified_name_of": lambda: operators.qualified_name_of(torch.relu) == "torch.relu",
    "operators.FUNCTION_TABLES": lambda: (
        [any(hasattr(t, n) for t in operators.FUNCTION_TABLES) for n in ("mm", "gelu", "linalg_qr")]
        == [True] * 3
    ),
    "aten.assert_async": lambda: (
        aten.assert_async.default(torch.tensor(True)) is None and bool(aten.assert_async.msg)
    ),
    "aten.ctc_loss": lambda: aten.ctc_loss.Tensor is not None,
    "aten.ctc_loss_backward": lambda: (
        aten.ctc_loss_backward.Tensor is not aten.ctc_loss_backward.default
    ),
    "aten.index_put_impl": lambda: (
        aten.index_put_impl.default(
            torch.zeros(2), [torch.tensor([1, 1])], torch.ones(2), True, True
        ).tolist()
        == [0, 2]
    ),
    "aten.local_scalar_dense": lambda: aten.local_scalar_dense.default(torch.tensor(3)) == 3,
    "aten.pack_padded_sequence": lambda: (
        aten.pack_padded_sequence.default(torch.ones(2, 2), torch.tensor([2, 1]), True)[1].tolist()
        == [2, 1]
    ),
    "aten.to_copy": lambda: aten.to_copy.default(torch.ones(1), dtype=torch.int64).item() == 1,
    "aten.unsafe_view": lambda: aten.unsafe_view.default(torch.ones(4), [2, 2]).shape == (2, 2),
    "aten.attention_in_cudnn": lambda: len(aten.attention_in_cudnn.default._schema.returns) >= 4,
    "aten.attention_in_flash": lambda: len(aten.attention_in_flash.default._schema.returns) >= 4,
    "aten.attention_in_efficient": lambda: (
        len(aten.attention_in_efficient.default._schema.returns) == 4
    ),
    "aten.attention_in_math": lambda: aten.attention_in_math(*QKV)[0].shape == QKV[0].shape,
    "dispatch.TorchDispatchMode": lambda: issubclass(Heard, dispatch.TorchDispatchMode),
    "dispatch.disable_current_modes": lambda: _hears_nothing(dispatch.disable_current_modes),
    "dispatch.current_dispatch_modes": _modes_inside,
    "dispatch.function_mode_at": _function_modes_inside,
    "dispatch.num_function_modes": _function_modes_inside,
    "dispatch.without_torch_dispatch": lambda: _hears_nothing(dispatch.without_torch_dispatch),
    "dispatch.without_torch_function": lambda: _silent(dispatch.without_torch_function),
    "dispatch.without_torch_function_of_subclasses": lambda: _silent(
        dispatch.without_torch_function_of_subclasses
    ),
    "dispatch.below_autograd": lambda: _under(dispatch.below_autograd),
    "dispatch.without_autocast": _casts_nothing,
    "fake_tensors.DataDependentOutputException": lambda: _raises(
        fake_tensors.DataDependentOutputException, lambda x: x.sum().item()
    ),
    "fake_tensors.DynamicOutputShapeException": lambda: _raises(
        fake_tensors.DynamicOutputShapeException, lambda x: x.nonzero()
    ),
    "fake_tensors.FakeTensor": lambda: isinstance(_fake(), fake_tensors.FakeTensor),
    "fake_tensors.FakeTensorMode": lambda: (_fake() + 1).shape == (2, 3),
    "fake_tensors.FAKE_TENSOR_LOGGER": lambda: (
        sys.modules[fake_tensors.FAKE_TENSOR_LOGGER].log.name == fake_tensors.FAKE_TENSOR_LOGGER
    ),
    "fake_tensors.pass_for_parameter": _passes_for_parameter,
}
