"""Scratch memory of kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graph_capture.costs import workspace
from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.costs.cost_model import Call
from graph_capture.costs.profile_cache import ProfileCache
from graph_capture.costs.workspace import WorkspaceProbe
from graph_capture.private_torch.operators import temporary_library

aten = torch.ops.aten


def _scratch(func: Any, *args: Any, probe: WorkspaceProbe | None = None) -> int:
    probe = probe or WorkspaceProbe("cpu", at_hand=True)
    return probe.bytes_of(Call(func=func, args=args, kwargs={}, out=None, grad_enabled=True))


def _real(func: Any, *args: Any) -> int:
    """Scratch of a real call, by the allocator's record, less its outputs."""
    with torch.no_grad():
        results: list[Any] = []
        peak = peak_extra_bytes(lambda: results.append(func(*args)))
    (result,) = results
    outputs = result if isinstance(result, tuple) else (result,)
    return peak - sum(t.untyped_storage().nbytes() for t in outputs)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.linalg_qr.default, (torch.randn(16, 32),)),
        (aten._linalg_svd.default, (torch.randn(16, 32),)),
        (aten.topk.default, (torch.randn(64, 64), 4)),
        (aten.cumsum.default, (torch.randn(64, 64), 0)),
        (aten._trilinear.default, (*(torch.randn(8, 1, 8) for _ in range(3)), [], [], [], [2])),
        (aten.mul.Tensor, (torch.randn(64, dtype=torch.cfloat), torch.randn(64))),
        (aten.mul.Tensor, (torch.randn(64, dtype=torch.cfloat), 2j)),
        (aten.sigmoid.default, (torch.randn(64, dtype=torch.cfloat).conj(),)),
        (aten.add.Tensor, (torch.randn(64, 80), torch.randn(80, 64).t())),
        (aten.linalg_qr.default, (torch.randn(8, 8, dtype=torch.cfloat).conj(),)),
        (aten.bmm.default, (*(torch.randn(2, 8, 8, dtype=torch.cfloat).mT.conj() for _ in "ab"),)),
    ],
    ids=lambda value: str(value) if not isinstance(value, tuple) else "",
)
def test_scratch_is_that_of_a_real_call(func: Any, args: tuple) -> None:
    """Scratch found on stand-ins is what a call on real numbers takes."""
    assert _scratch(func, *(_as_meta(a) for a in args)) == _real(func, *args)


def _as_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.conj().to("meta").conj() if value.is_conj() else value.to("meta")


def test_a_product_copies_what_is_not_dense() -> None:
    """A product copies an operand of which neither rows nor columns are dense."""
    x = torch.empty_strided((4, 8), (32, 2), device="meta")
    y = torch.empty(8, 8, device="meta")
    assert _scratch(aten.mm.default, x, y) == 4 * 8 * 4
    assert _scratch(aten.mm.default, y.t(), y) == 0


def test_a_copy_of_columns_goes_through_a_block() -> None:
    """Copying a larger transposed matrix takes a block of 60 times 60 elements on the way."""
    to, columns = torch.randn(64, 80), torch.randn(80, 64).t()
    expected = peak_extra_bytes(lambda: to.copy_(columns))
    assert _scratch(aten.copy_.default, to.to("meta"), columns.to("meta")) == expected == 14_400


def test_kernels_that_move_memory_take_none() -> None:
    """Copies and concatenations are not run and count zero."""
    x = torch.empty(10**12, device="meta")  # does not fit into any machine
    assert _scratch(aten.clone.default, x) == 0
    assert _scratch(aten.cat.default, [x, x]) == 0


def test_without_a_device_nothing_is_run() -> None:
    """On a meta device, on a card, or when not wanted, scratch is zero and nothing runs."""
    x = torch.empty(10**9, 10**3, device="meta")
    for probe in (
        WorkspaceProbe("cpu", at_hand=False),
        WorkspaceProbe("cuda", at_hand=True),
        WorkspaceProbe("cpu", at_hand=True, scratch=False),
    ):
        assert _scratch(aten.cumsum.default, x, 0, probe=probe) == 0


def test_probing_leaves_the_generator_alone() -> None:
    """A kernel that draws is tried, and the generator stands where it stood."""
    before = torch.get_rng_state()
    _scratch(aten.rrelu_with_noise.default, torch.ones(8), torch.ones(8), 0.1, 0.3, True)
    _scratch(aten.randperm.default, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_does_not_run_counts_zero() -> None:
    """A kernel that refuses its stand-ins counts zero instead of ending the capture."""
    x = torch.empty(2, 3, device="meta")
    assert _scratch(aten.linalg_inv_ex.default, x) == 0


def test_real_sizes_of_packed_outputs() -> None:
    """What an embedding bag hands out beside the sums is measured, not assumed."""
    sizes = WorkspaceProbe("cpu", at_hand=True).output_bytes(
        aten._embedding_bag.default,
        (torch.ones(50, 8), torch.zeros(40, dtype=torch.long), torch.tensor([0, 7, 15, 30])),
        {},
    )
    assert sizes is not None
    assert sizes[0] == 4 * 8 * 4


@pytest.mark.parametrize("part", [slice(0, 10), slice(10, 20)])
def test_a_copy_of_a_part_takes_all_of_its_memory(part: slice) -> None:
    """Calls that write to a part functionally copy what the part lies in."""
    x = torch.zeros(64, 64)[part]
    given = (x, x[:2].clone(), 0, 0, 2)
    sizes = WorkspaceProbe("cpu", at_hand=True).output_bytes(aten.slice_scatter.default, given, {})
    assert sizes == (aten.slice_scatter.default(*given).untyped_storage().nbytes(),)


@pytest.mark.gpu
def test_scratch_on_a_card_is_that_of_a_real_call() -> None:
    """What a sort takes on a card beside its outputs, by the caching allocator's own figures."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1 << 16, device=device)
    aten.sort.default(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = aten.sort.default(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    expected = peak - sum(t.untyped_storage().nbytes() for t in results)
    probe = WorkspaceProbe(device, at_hand=True)
    assert _scratch(aten.sort.default, x.to("meta"), probe=probe) == expected


def test_what_does_not_fit_now_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that found no room counts zero, and is measured when there is room again."""
    x = torch.empty(64, 64, device="meta")
    cache = ProfileCache(tmp_path, "here")
    with monkeypatch.context() as patched:
        patched.setattr(workspace, "free_bytes", lambda _: 100)
        probe = WorkspaceProbe("cpu", at_hand=True, cache=cache)
        assert _scratch(aten.linalg_qr.default, x, probe=probe) == 0
    probe = WorkspaceProbe("cpu", at_hand=True, cache=cache)
    real = _scratch(aten.linalg_qr.default, x, probe=probe)
    assert real == _real(aten.linalg_qr.default, torch.randn(64, 64)) > 0
    monkeypatch.setattr(workspace, "_measure", lambda *_: 1 / 0)
    known = WorkspaceProbe("cpu", at_hand=True, cache=cache)
    assert _scratch(aten.linalg_qr.default, x, probe=known) == real


def test_a_host_without_memory_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's error for want of memory is no PyTorch error, and ends no capture either."""

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 1. TiB")

    monkeypatch.setattr("graph_capture.costs.trial.np.zeros", out_of_memory)
    probe = WorkspaceProbe("cpu", at_hand=True)
    x = torch.empty(64, 64, device="meta")
    assert _scratch(aten.topk.default, x, 4, probe=probe) == 0
    assert "1 distinct calls not measured" in probe.notes[0]


def test_a_kernel_of_another_library_is_not_run_and_named() -> None:
    """It may do anything on made-up values, and its scratch is not known: the notes say so."""
    with temporary_library("elsewhere", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: pytest.fail("it ran"), "CPU")
        probe, x = WorkspaceProbe("cpu", at_hand=True), torch.ones(64)
        assert _scratch(torch.ops.elsewhere.twice.default, x, probe=probe) == 0
    assert "scratch of elsewhere::twice not measured, counted as zero" in probe.notes[0]


def test_a_call_that_takes_too_long_is_not_run() -> None:
    """Its scratch counts as zero, and the notes say how many such calls there are."""
    x = torch.ones(64, 64)
    call = Call(func=aten.cumsum.default, args=(x, 0), kwargs={}, out=x)
    probe = WorkspaceProbe("cpu", at_hand=True, too_long=lambda _call: True)
    assert probe.notes == ()
    assert probe.bytes_of(call) == probe.bytes_of(call) == 0
    assert "scratch of 1 distinct calls not measured" in probe.notes[0]


def _by_rows(dtype: torch.dtype) -> list[tuple[Any, tuple]]:
    x, target = torch.randn(33, 1003, dtype=dtype), torch.zeros(33, dtype=torch.long)
    weight = aten.nll_loss_forward.default(x, target, None, 1, -100)[1]
    return [
        (aten._softmax.default, (x, -1, False)),
        (aten._log_softmax.default, (x, 1, False)),
        (aten._softmax_backward_data.default, (x, x, -1, dtype)),
        (aten._log_softmax_backward_data.default, (x, x, 1, dtype)),
        (aten.nll_loss_forward.default, (x, target, None, 1, -100)),
        (aten.nll_loss_backward.default, (x[0, 0].clone(), x, target, None, 1, -100, weight)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls_by_rows_take_none_and_are_not_run(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax and the loss over dense rows: none in a real call, so none is measured."""
    assert [_real(func, *args) for func, args in _by_rows(dtype)] == [0] * 6
    monkeypatch.setattr(workspace, "_measure", lambda *_: pytest.fail("was run"))
    for func, args in _by_rows(dtype):
        call = Call(func=func, args=args, kwargs={}, out=func(*args))
        assert WorkspaceProbe("cpu", at_hand=True).bytes_of(call) == 0


def test_calls_along_columns_are_measured() -> None:
    """A softmax along another dimension than the last is run like any other call."""
    x = torch.randn(16, 8, 8)
    assert not workspace._plain_rows(
        Call(func=aten._softmax.default, args=(x, 0, False), kwargs={}, out=x)
    )
    assert _scratch(aten._softmax.default, x, 0, False) == _real(aten._softmax.default, x, 0, False)


def test_a_mask_takes_scratch_for_what_it_picks() -> None:
    """Places that a boolean index picks are listed in scratch, 8 bytes a place and dimension."""
    x, mask = torch.empty(100, 8), torch.empty(100, dtype=torch.bool)
    sizes = []
    for num_picked in (10, 50):
        call = Call(
            func=torch.ops.aten.index.Tensor,
            args=(x, [mask]),
            kwargs={},
            out=torch.empty(num_picked, 8),
        )
        sizes.append(WorkspaceProbe("cpu", at_hand=True).bytes_of(call))
    assert sizes[1] - sizes[0] == 40 * 8
