from __future__ import annotations

from dataclasses import replace

from planner.plots.titles import LONGEST_LINE, title_of_comparison

from .made import MB, row, step, whole_comparison

RAN = replace(
    whole_comparison(),
    measured_on="a real card",
    num_threads=1,
    dtype="float32",
    autocast="bfloat16",
    optimizer="adamw",
)


def test_predicted_figures_name_the_cost_table() -> None:
    """Where nothing of it is drawn, the machine that steps ran on is not named."""
    assert title_of_comparison("figures", RAN).splitlines() == [
        "Chain: figures",
        "predicted times (roofline) for a card, float32, autocast bfloat16, adamw, torch 2.13.0",
    ]


def test_measured_figures_name_what_they_were_measured_on() -> None:
    """Machine, threads, pairs; nothing of the cost table."""
    title = title_of_comparison("figures", RAN, predicted=False, measured=True)
    assert title.splitlines() == [
        "Chain: figures",
        "measured on a real card, 1 thread, 8 pairs of steps, float32, autocast bfloat16, adamw, "
        "torch 2.13.0",
    ]


def test_figures_of_both_kinds_name_both() -> None:
    """A line each."""
    _, predicted, measured = title_of_comparison("figures", RAN, measured=True).splitlines()
    assert predicted == "predicted times (roofline) for a card"
    assert measured.startswith("measured on a real card, 1 thread")


def test_what_an_older_file_does_not_say_is_not_made_up() -> None:
    """Without a machine the title says so; pairs are counted in the rows."""
    rows = (row("a", MB, 0.1, measured=step(MB, 1.1, num_pairs=3)), *whole_comparison().rows)
    old = replace(whole_comparison(), rows=rows)
    title = title_of_comparison("figures", old, predicted=False, measured=True)
    assert title.splitlines()[1] == (
        "measured on a machine that was not recorded, 3 to 8 pairs of steps, torch 2.13.0"
    )


def test_long_titles_are_broken() -> None:
    """No line is wider than the figure, and versions stay with their names."""
    long = replace(RAN, model="a " * 100, measured_on="a card of a very long name")
    lines = title_of_comparison("figures", long, predicted=False, measured=True).splitlines()
    assert max(map(len, lines)) <= LONGEST_LINE
    assert lines[-2].endswith("adamw,")
    assert lines[-1] == "torch 2.13.0"
