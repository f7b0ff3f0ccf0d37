"""The cost graph as data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from tests.hostile import mutated


def _graph() -> CostGraph:
    """x (100, resident) -> f -> a (40) -> g -> b (8, kept); g reads x as well."""
    return CostGraph(
        (
            Operator(name="f", target="aten.f", inputs=(0,), outputs=(1,), cost_ns=5),
            Operator(
                name="g",
                target="aten.g",
                inputs=(0, 1),
                outputs=(2,),
                cost_ns=7,
                workspace_bytes=3,
                phase="backward",
            ),
        ),
        (
            Storage(name="x", size_bytes=100, producer=None, category="input"),
            Storage(name="a", size_bytes=40, producer=0),
            Storage(name="b", size_bytes=8, producer=1, category="gradient", kept=True),
        ),
    )


def test_sums_and_readers() -> None:
    """Resident bytes, base cost, readers and the working set are those counted by hand."""
    graph = _graph()
    assert graph.resident_bytes == 100
    assert graph.base_cost_ns == 12
    assert graph.consumers == ((0, 1), (1,), ())
    assert graph.working_set_bytes(1) == 40 + 8 + 3


def test_json_both_ways() -> None:
    """A graph read from its JSON is the graph."""
    graph = _graph()
    assert CostGraph.from_json(graph.to_json()) == graph
    assert CostGraph.from_json(graph.to_json()).fingerprint == graph.fingerprint


def test_another_format_is_refused() -> None:
    """JSON of another format is refused by its number."""
    with pytest.raises(ValueError, match="format 99"):
        CostGraph.from_dict({**_graph().to_dict(), "format": 99})


def test_a_field_that_is_missing_is_refused() -> None:
    """JSON that lacks a field is no cost graph."""
    data = _graph().to_dict()
    del data["storages"][0]["producer"]
    with pytest.raises(ValueError, match="not a cost graph"):
        CostGraph.from_dict(data)


def test_networkx_view() -> None:
    """Operators are nodes with their attributes; what flows between two is on their edge."""
    view = _graph().to_networkx()
    assert list(view.nodes) == [0, 1]
    assert view.nodes[1]["workspace_bytes"] == 3
    assert list(view.edges(data=True)) == [(0, 1, {"storages": [1], "size_bytes": 40})]


def test_the_fingerprint_ignores_costs_and_what_nobody_reads() -> None:
    """Costs, scratch and resident storages without a reader leave the fingerprint alone."""
    graph = _graph()
    operators = tuple(replace(op, cost_ns=99, workspace_bytes=9) for op in graph.operators)
    kept = Storage(name="held", size_bytes=77, producer=None, category="buffer")
    assert CostGraph(operators, (*graph.storages, kept)).fingerprint == graph.fingerprint


@pytest.mark.parametrize("change", ["target", "size", "pin", "wire"])
def test_the_fingerprint_sees_what_is_computed(change: str) -> None:
    """Another call, size, pin or wiring is another fingerprint."""
    graph = _graph()
    f, g = graph.operators
    x, a, b = graph.storages
    changed = {
        "target": CostGraph((replace(f, target="aten.h"), g), graph.storages),
        "size": CostGraph(graph.operators, (x, replace(a, size_bytes=41), b)),
        "pin": CostGraph((replace(f, pinned="because"), g), graph.storages),
        "wire": CostGraph((f, replace(g, inputs=(1,))), graph.storages),
    }[change]
    assert changed.fingerprint != graph.fingerprint


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cost_ns", -1, "negative"),
        ("inputs", (9,), "names no storage"),
        ("inputs", (2,), "before it is produced"),
        ("outputs", (1, 2), "two producers"),
        ("outputs", (), "not an output of its producer"),
    ],
)
def test_a_graph_that_makes_no_sense_is_refused(field: str, value: object, message: str) -> None:
    """Negative figures, dangling indices, reading too early and disputed producers are refused."""
    graph = _graph()
    broken = replace(graph.operators[0], **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        CostGraph((broken, graph.operators[1]), graph.storages)


def test_whatever_is_no_cost_graph_is_a_value_error() -> None:
    """Of 1,500 damaged texts each is read or refused with a ValueError, never another error."""
    refusals = []
    for text in mutated(_graph().to_dict(), 1500, seed=3):
        try:
            CostGraph.from_json(text)  # type: ignore[arg-type]
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 1000
    assert max(map(len, refusals)) < 1000


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "[" * 100_000, '{"format": 1e400}', '{"format": 1, "format": 1}', "1"],
)
def test_text_that_is_no_object_is_a_value_error(text: str) -> None:
    """Empty, deeply nested, infinite, doubled."""
    with pytest.raises(
        ValueError, match=r"not a cost graph|cost graph of format|nested|too large|twice|Expecting"
    ):
        CostGraph.from_json(text)


@pytest.mark.parametrize("figure", ["size_bytes", "cost_ns"])
def test_figures_beyond_64_bits_are_refused(figure: str) -> None:
    """What solvers cannot add up is no graph."""
    storage, operator = (
        Storage(name="x", size_bytes=1, producer=0),
        Operator(name="a", outputs=(0,)),
    )
    if figure == "size_bytes":
        storage = replace(storage, size_bytes=2**63)
    else:
        operator = replace(operator, cost_ns=2**63)
    with pytest.raises(ValueError, match="solvers cannot reckon"):
        CostGraph((operator,), (storage,))
