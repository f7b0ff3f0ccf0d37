"""A sample of the operator sweep."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from benchmarks.sweeps.operator_cases import Case, NoCase, all_cases, some_cases, subject_of
from benchmarks.sweeps.operator_judge import class_of_refusal, judge
from benchmarks.sweeps.operators import table

ALLOWED = ("green", "refused", "prediction off", "no case")

MENDED = (
    ("operator", "block_diag", "transposed"),  # a wrapper of the same name was called
    ("operator", "linalg.eig", "contiguous"),  # scratch of conjugated arguments
    ("operator", "logaddexp2", "transposed"),  # strides of pow
    ("operator", "mT", "transposed"),  # a scalar in a bound's rows
    ("operator", "ormqr", "transposed"),  # strides of a gradient
    ("operator", "polar", "contiguous"),  # scratch of a complex number
    ("operator", "polar", "reversed"),  # a complex product in place of its argument
    ("operator", "reshape", "transposed"),  # a block that copies go through
    ("operator", "sgn", "contiguous"),  # a gradient without memory
)


@pytest.fixture(scope="module", autouse=True)
def _young_objects_alone() -> Iterator[None]:
    """Each peak is recorded after a collection, which would look at all of PyTorch otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _assert_keeps_the_promise(case: Case) -> None:
    verdict = judge(case)
    assert verdict.outcome in ALLOWED, f"{case}: {verdict.why}"


@pytest.mark.parametrize("rank", range(2))  # who only collects tests need not load the databases
def test_case_keeps_the_promise(rank: int) -> None:
    """No case has other bits, other strides or a higher peak than its budget, or raises later."""
    _assert_keeps_the_promise(some_cases(2, seed=2)[rank])


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(50))
def test_more_cases_keep_the_promise(rank: int) -> None:
    """The same of more cases."""
    _assert_keeps_the_promise(some_cases(50, seed=1)[rank])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "layout"), MENDED)
def test_mended_cases_keep_the_promise(kind: str, name: str, layout: str) -> None:
    """The same of cases that did not once."""
    _assert_keeps_the_promise(Case(kind=kind, name=name, sample=0, layout=layout))


def test_layouts_give_other_strides() -> None:
    """A transposed case hands its operator an activation that is not contiguous."""
    case = Case(kind="module", name="nn.BatchNorm1d", sample=0, layout="transposed")
    (values,) = subject_of(case)().values
    assert values.stride() == (values.shape[1] * values.shape[2], 1, values.shape[1])


def test_absent_samples_are_no_cases() -> None:
    """An operator without an in-place variant has no such case."""
    with pytest.raises(NoCase, match="no in-place variant"):
        subject_of(Case(kind="operator", name="prod", sample=0, layout="in_place"))


def test_there_are_hundreds_of_operators() -> None:
    """The databases are all there: far more operators and modules than anyone writes down."""
    assert len({(c.kind, c.name) for c in all_cases(1)}) > 600


def test_table_counts_by_class() -> None:
    """What is not green stands in the table with its class."""
    verdict = judge(Case(kind="operator", name="prod", sample=0, layout="in_place"))
    assert "| refused | 0 |" in table([verdict], 1, 1.0)
    assert class_of_refusal("x\n  a 'b' 12 c (at d)") == "a … … c"
