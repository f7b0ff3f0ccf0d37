"""Made-up arguments of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph_capture.costs.cost_model import Call
from graph_capture.costs.trial import (
    Maker,
    Trial,
    argument_bytes,
    as_in_a_step,
    call_key,
    is_safe,
    output_bytes,
)

aten = torch.ops.aten
CPU = torch.device("cpu")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _call(func: Any, *args: Any, out: Any = None, **kwargs: Any) -> Call:
    return Call(func=func, args=args, kwargs=kwargs, out=out)


def _trial(func: Any, *args: Any, **kwargs: Any) -> Trial:
    return Maker(CPU).trial(_call(func, *args, **kwargs))


def test_arguments_look_like_those_of_the_step() -> None:
    """Shape, strides and dtype are kept, gaps between rows included; values are normal numbers."""
    x = torch.empty_strided((64, 50), (200, 2), dtype=torch.float64, device="meta")
    (real, one) = _trial(aten.add.Tensor, x, 3).args
    assert (real.shape, real.stride(), real.dtype) == (x.shape, x.stride(), x.dtype)
    assert real.device == CPU
    assert one == 3
    assert real.mean().abs() < 0.1
    assert 0.9 < real.std() < 1.1


def test_an_expanded_argument_is_made_once() -> None:
    """An argument that is expanded from one number holds one number."""
    x = _meta(1).expand(10**12)
    (real, _) = _trial(aten.mul.Tensor, x, 2).args
    assert real.untyped_storage().nbytes() == 4


def test_a_tensor_that_is_passed_twice_is_made_once() -> None:
    """``x * x`` runs on one tensor, and has another key than ``x * y``."""
    x, y = _meta(8), _meta(8)
    a, b = _trial(aten.mul.Tensor, x, x).args
    assert a is b
    square, product = _call(aten.mul.Tensor, x, x), _call(aten.mul.Tensor, x, y)
    assert call_key(square, "cpu") != call_key(product, "cpu")


@pytest.mark.parametrize(
    ("func", "args", "place", "end"),
    [
        (aten.embedding.default, (_meta(50, 4), _meta(300, dtype=torch.long)), 1, 50),
        (
            aten.embedding_dense_backward.default,
            (_meta(300, 4), _meta(300, dtype=torch.long), 50, -1, False),
            1,
            50,
        ),
        (
            aten.nll_loss_forward.default,
            (_meta(300, 7), _meta(300, dtype=torch.long), None, 1, -100),
            1,
            7,
        ),
        (aten.gather.default, (_meta(9, 40), 1, _meta(9, 30, dtype=torch.long)), 2, 40),
        (aten.index_select.default, (_meta(9, 40), -1, _meta(100, dtype=torch.long)), 2, 40),
        (
            aten.scatter_add.default,
            (_meta(9, 40), 1, _meta(9, 30, dtype=torch.long), _meta(9, 30)),
            2,
            40,
        ),
        (
            aten.max_pool2d_with_indices_backward.default,
            (
                _meta(2, 3, 8, 8),
                _meta(2, 3, 16, 16),
                [2, 2],
                [2, 2],
                [0, 0],
                [1, 1],
                False,
                _meta(2, 3, 8, 8, dtype=torch.long),
            ),
            7,
            256,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_indices_lie_all_over_what_they_index(func: Any, args: tuple, place: int, end: int) -> None:
    """Indices stay below the end of their range, come near it, and the call runs on them."""
    trial = _trial(func, *args)
    indices = trial.args[place]
    assert indices.min() >= 0
    assert end * 0.7 < indices.max() + 1 <= end
    with as_in_a_step(CPU):
        trial()


def test_indices_of_several_dimensions() -> None:
    """Each list of ``x[i, j]`` has the range of its own dimension."""
    lists = [_meta(500, dtype=torch.long), None, _meta(500, dtype=torch.long)]
    trial = _trial(aten.index.Tensor, _meta(10, 2, 1000), lists)
    rows, nothing, columns = trial.args[1]
    assert nothing is None
    assert rows.max() == 9
    assert 900 < columns.max() < 1000


def test_integers_that_nobody_indexes_with_are_ones() -> None:
    """An integer division runs: no divisor is zero."""
    trial = _trial(
        aten.div.Tensor_mode,
        _meta(8, dtype=torch.long),
        _meta(8, dtype=torch.long),
        rounding_mode="floor",
    )
    with as_in_a_step(CPU):
        assert trial().tolist() == [1] * 8


def test_variances_are_positive() -> None:
    """A batch norm's backward gets no negative deviation, a root no negative number."""
    (x,) = _trial(aten.sqrt.default, _meta(1000)).args
    assert x.min() > 0


def test_a_mask_has_runs_of_both_values() -> None:
    """A mask holds true and false, each in rows."""
    mask = _trial(aten.masked_fill.Scalar, _meta(256), _meta(256, dtype=torch.bool), 0.0).args[1]
    changes = (mask[1:] != mask[:-1]).sum()
    assert 0 < changes < 16


def test_what_a_call_wrote_is_undone() -> None:
    """After ``refresh`` an argument that a call writes to has its first values again."""
    x = _meta(100)
    trial = _trial(aten.mul_.Tensor, x, 1e-30)
    before = trial.args[0].clone()
    for _ in range(3):
        trial.refresh()
        with as_in_a_step(CPU):
            trial()
    assert torch.equal(trial.args[0], before * 1e-30)


def test_an_out_argument_is_written_to() -> None:
    """A call with ``out=`` over its own argument runs in place, as the planned step does."""
    x, y = _meta(100), _meta(100)
    trial = _trial(aten.add.out, x, y, out=x)
    assert trial.kwargs == {} or trial.kwargs["out"] is trial.args[0]


def test_generators_come_back() -> None:
    """Arguments and draws leave the random generator where it stood."""
    before = torch.get_rng_state()
    with as_in_a_step(CPU):
        trial = _trial(aten.bernoulli_.float, _meta(100), 0.5)
        trial()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_runs_outside_autocast() -> None:
    """A product of float32 stays one: where a step casts, that is a call of its own."""
    trial = _trial(aten.mm.default, _meta(4, 4), _meta(4, 4))
    with torch.autocast("cpu", torch.bfloat16), as_in_a_step(CPU):
        assert trial().dtype == torch.float32


def test_the_key_tells_calls_apart() -> None:
    """Shape, stride, dtype, other arguments and grad mode are in the key; values are not."""
    x = _meta(4, 8)
    calls = [
        _call(aten.sum.dim_IntList, x, [0]),
        _call(aten.sum.dim_IntList, x, [1]),
        _call(aten.sum.dim_IntList, _meta(8, 4).t(), [0]),
        _call(aten.sum.dim_IntList, _meta(4, 9), [0]),
        _call(aten.sum.dim_IntList, x.double(), [0]),
        Call(func=aten.sum.dim_IntList, args=(x, [0]), kwargs={}, out=None, grad_enabled=True),
    ]
    assert len({call_key(call, "cpu") for call in calls}) == len(calls)
    again = _call(aten.sum.dim_IntList, torch.ones(4, 8), [0])
    assert call_key(calls[0], "cpu") == call_key(again, "cpu")


@pytest.mark.parametrize(
    ("func", "safe"),
    [
        (aten.mm.default, True),
        (aten.mkldnn_rnn_layer.default, True),
        (aten._ctc_loss_backward.default, False),
        (aten._cudnn_rnn.default, False),
        (torch.ops.profiler._record_function_enter_new.default, False),
    ],
)
def test_what_may_run_alone(func: Any, safe: bool) -> None:
    """Kernels that follow their arguments' values through memory are not run on made-up ones."""
    assert is_safe(func) == safe


def test_bytes_of_a_trial() -> None:
    """Arguments by hand: 400 bytes and a copy of what is written; outputs likewise."""
    x = _meta(100)
    assert argument_bytes(_call(aten.relu.default, x)) == 400
    assert argument_bytes(_call(aten.relu_.default, x)) == 800
    assert output_bytes(_call(aten.relu.default, x, out=x)) == 400


def test_the_key_tells_where_a_tensor_lies() -> None:
    """Beside a card, a tensor on the CPU is another argument than one on the card."""
    here, there = torch.ones(4), _meta(4)  # stand-ins on meta lie where the step runs
    on_cpu, on_card = _call(aten.neg.default, here), _call(aten.neg.default, there)
    assert call_key(on_cpu, "cpu") == call_key(on_card, "cpu")
    assert call_key(on_cpu, "cuda") != call_key(on_card, "cuda")
