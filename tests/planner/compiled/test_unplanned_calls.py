"""A training step that Dynamo runs as plain Python is never silent."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_capture.private_torch.compiled_calls import hearing_of_compiles
from planner import InfeasibleBudgetError, PlanWarning
from planner.compiled import install
from planner.compiled.unplanned_calls import PARTLY_UNPLANNED, UNPLANNED, UnplannedCalls, by_plan
from tests.planner.compiled.models import WithLoss, compiled, model_and_sample, step


class _Recurrent(nn.Module):
    """An LSTM and a loss; around it may be layers, which Dynamo takes."""

    def __init__(self, *, around: bool) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8) if around else nn.Identity()
        self.recurrent = nn.LSTM(8, 8)
        self.after = nn.Linear(8, 8) if around else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.before(x))
        found: Tensor = self.after(self.recurrent(x)[0])
        return found.square().mean()


@contextmanager
def _said() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    said = [str(w.message) for w in caught if issubclass(w.category, PlanWarning)]
    found += [text for text in said if text in (UNPLANNED, PARTLY_UNPLANNED)]


def _of(call: Callable[..., Tensor], *samples: Tensor) -> list[str]:
    with _said() as found:
        for sample in samples:
            call(sample).backward()
    return found


X = torch.linspace(-1, 1, 48).reshape(3, 2, 8)


def test_a_function_that_dynamo_gives_up_on_is_said_once() -> None:
    """No backend is asked for a step that is an LSTM's alone."""
    call, plans = compiled(nn.LSTM(8, 8), budget_bytes=10**6)
    with _said() as found:
        for _ in range(2):
            call(X)[0].square().mean().backward()
    assert (found, plans) == ([UNPLANNED], [])


def test_plain_python_beside_graphs_is_said_once() -> None:
    """The layers around an LSTM are planned, and it is not."""
    call, plans = compiled(_Recurrent(around=True), budget_bytes=10**6)
    assert _of(call, X, X) == [PARTLY_UNPLANNED]
    assert plans


@pytest.mark.filterwarnings("ignore::planner.PlanWarning", "ignore:The .grad attribute")
def test_a_least_budget_beside_plain_python_says_what_it_leaves_out() -> None:
    """Dynamo breaks at the average of all batches, within the loop over the layers."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None))

    def loss(x: Tensor) -> Tensor:
        found: Tensor = layers(x).square().mean()
        return found

    torch.compiler.reset()
    call = torch.compile(loss, backend="remat", options={"budget_bytes": 1, "lower": "aot_eager"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        call(X.flatten(0, 1))
    error = caught.value.inner_exception
    assert isinstance(error, InfeasibleBudgetError)
    assert "so may what runs as plain Python" in str(error)


def test_graphs_without_gradients_do_not_hide_it() -> None:
    """What is compiled before the LSTM has no parameters."""
    call, plans = compiled(_Recurrent(around=False), budget_bytes=10**6)
    assert _of(call, X) == [UNPLANNED]
    assert plans == []


@pytest.mark.slow
def test_a_part_that_is_disabled_is_said() -> None:
    """It runs as plain Python by the user's wish, and takes memory all the same."""
    model, x = model_and_sample()
    assert isinstance(model, WithLoss)
    model.blocks[1].forward = torch.compiler.disable(model.blocks[1].forward)  # type: ignore
    call, _ = compiled(model, budget_bytes=10**6)
    assert _of(call, x) == [PARTLY_UNPLANNED]


def test_the_limit_of_compiling_again_is_said() -> None:
    """Dynamo then runs other shapes without a plan."""
    model, x = model_and_sample()
    torch.compiler.reset()
    options = {"budget_bytes": 10**6, "lower": "aot_eager"}
    call = torch.compile(model, backend="remat", dynamic=False, options=options)
    with torch._dynamo.config.patch(recompile_limit=2):
        assert _of(call, x, x[:100]) == []
        assert _of(call, x[:90], x[:80], x) == [UNPLANNED]


def test_an_error_that_is_suppressed_is_said() -> None:
    """A budget that nothing fits is then no error of Dynamo's."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=1000)
    with torch._dynamo.config.patch(suppress_errors=True):
        assert _of(call, x) == [UNPLANNED]


def test_planned_steps_and_inference_are_not_said() -> None:
    """Nodes that are made while Dynamo compiles are nobody's, and without gradients are none."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=10**6)
    assert _of(call, x, x) == []
    recurrent, _ = compiled(nn.LSTM(8, 8), budget_bytes=10**6)
    with _said() as found, torch.no_grad():
        recurrent(X)
    assert found == []


@pytest.mark.slow
def test_a_model_of_plain_python_that_calls_compiled_parts_is_said_only_for_itself() -> None:
    """What an inner ``torch.compile`` planned is planned for the outer one, too."""
    model, x = model_and_sample()
    torch.compiler.reset()
    options = {"budget_bytes": 10**6, "lower": "aot_eager"}
    inner = torch.compile(model, backend="remat", options=options)
    outer = torch.compile(
        torch.compiler.disable(lambda x: inner(x), recursive=False),
        backend="remat",
        options=options,
    )
    assert _of(outer, x) == []


@pytest.mark.slow
def test_a_compiled_model_is_copied() -> None:
    """With what looks at its calls."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=10**6)
    expected = step(model, call, x)["loss"]
    again = copy.deepcopy(call)
    assert torch.equal(step(again, again, x)["loss"], expected)
    assert pickle.loads(pickle.dumps(UnplannedCalls().call)).__name__ == "call"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's own
def test_within_install_it_is_said_once() -> None:
    """By the call, so that the end of the block does not say it again."""
    torch.compiler.reset()
    call = torch.compile(nn.LSTM(8, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with install(budget_bytes=10**6) as plans:
            call(X)[0].square().mean().backward()
    said = [str(w.message) for w in caught if issubclass(w.category, PlanWarning)]
    assert (said, plans) == ([UNPLANNED], [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's own
def test_code_of_before_the_block_is_said() -> None:
    """It is not compiled again, and has no plan."""
    torch.compiler.reset()
    call = torch.compile(lambda x: x.sin().sum(), backend="inductor")
    x = torch.ones(3, requires_grad=True)
    call(x).backward()
    with _said() as found, install(budget_bytes=10**6):
        call(x).backward()
    assert found == [UNPLANNED]
    with _said() as found:
        call(x).backward()
    assert found == []


def test_an_error_in_a_planned_graph_is_no_plain_python() -> None:
    """A loop that catches it, as for want of memory, is told nothing else."""

    def graph(x: Tensor) -> Tensor:
        x.sin()
        raise MemoryError("in the graph")

    calls, x = UnplannedCalls(), torch.ones(3, requires_grad=True)

    def call() -> None:
        context = calls.call()
        context.__enter__()
        try:
            by_plan(graph)(x)
        finally:
            x.cos()
            context.__exit__(None, None, None)  # as Dynamo does

    with pytest.raises(MemoryError, match="in the graph"):
        call()
    assert not calls.said


def test_what_another_thread_compiles_is_not_heard() -> None:
    """Its nodes are not this thread's."""
    told: list[str] = []
    call = torch.compile(lambda x: x * 5.0, backend="eager")
    with hearing_of_compiles(lambda: told.append("begins"), lambda: told.append("ends")):
        other = threading.Thread(target=call, args=(torch.ones(2),))
        other.start()
        other.join()
        assert told == []
        call(torch.ones(2, 2, 2))
    assert told == ["begins", "ends"]
