"""Plan files: what is written is what is read, and what is damaged is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from benchmarks.testing.bitwise import assert_same_training
from benchmarks.testing.zoo import ZOO
from planner import Plan, PlanError, optimize
from planner.planning.make_plan import replan
from planner.saving.serialize import (
    plan_from_dict,
    plan_to_dict,
    schema,
)
from tests.planner.small import Net, make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with an optimizer, rules of the user and a plain argument."""
    return plan_for(
        make(),
        {"x": sample(), "scale": 0.5},
        loss_fn=square,
        optimizer="adamw",
        never_recompute=("aten.addmm",),
    )


@pytest.fixture(scope="module")
def written(plan) -> dict[str, Any]:
    """The plan as it stands in the file."""
    return json.loads(json.dumps(plan_to_dict(plan)))


# -- there and back -------------------------------------------------------------------


def test_what_is_saved_is_loaded(plan, tmp_path):
    """Every field, the figures and the report are equal."""
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert loaded.predicted_peak_bytes == plan.predicted_peak_bytes


def test_saving_twice_gives_the_same_file(plan, tmp_path):
    """A file that is loaded and saved again is the same, byte for byte."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    plan.save(first)
    Plan.load(str(first)).save(str(second))
    assert first.read_bytes() == second.read_bytes()


def test_the_schema_is_a_schema_and_fits(written):
    """The published schema is valid JSON Schema and describes what is written."""
    Draft202012Validator.check_schema(schema())
    Draft202012Validator(schema()).validate(written)


def test_decisions_say_what_the_schedule_does(plan, written):
    """``runs`` counts an operator in the schedule; a saved storage lives across the loss."""
    for v, operator in enumerate(written["operators"]):
        assert operator["runs"] == plan.schedule.order.count(v)
    decisions = {s["decision"] for s in written["storages"]}
    assert decisions == {"resident", "saved", "recomputed", "transient"}
    for storage, record in zip(plan.graph.storages, written["storages"], strict=True):
        assert (record["decision"] == "resident") == (storage.producer is None)


def test_a_file_from_before_reordering_is_of_eagers_order(written):
    """The flag may be missing; a file that has it is held to it."""
    assert written["solver"]["reorder"] is False
    reordered = copy.deepcopy(written)
    reordered["solver"]["reorder"] = True
    assert plan_from_dict(reordered).reorder
    older = copy.deepcopy(written)
    del older["solver"]["reorder"]
    assert plan_from_dict(older) == plan_from_dict(written)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        pytest.param("t5", marks=pytest.mark.slow),
        pytest.param("resnet50", marks=pytest.mark.slow),
        "many_outputs",
        "mlp_frozen",
    ],
)
def test_a_loaded_plan_trains_with_the_same_bits(name, tmp_path):
    """On a new model, which has never been seen by the planner."""
    case = ZOO[name]("tiny")
    first = optimize(case.make(), case.sample(0), budget_gb=1, loss_fn=case.loss_fn)
    share = {"many_outputs": 1.0, "mlp_frozen": 0.9}.get(name, 0.8)
    budget_bytes = int(share * first.baseline_peak_bytes)
    options = {"loss_fn": case.loss_fn, "time_limit_s": 1}
    optimize(case.make(), case.sample(0), budget_bytes=budget_bytes, **options).save(
        tmp_path / "plan.json"
    )
    plan = Plan.load(tmp_path / "plan.json")
    assert_same_training(case.build, plan.apply, case.sample, loss_fn=case.loss_fn, steps=2)


PROGRAM = """
import sys
import torch
from planner import Plan
from tests.planner.small import make, sample, square
torch.set_num_threads(1)
model = Plan.load(sys.argv[1]).apply(make())
torch.manual_seed(1)
square(model(sample(1), 0.5)).backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, sys.argv[2])
"""


def test_a_plan_in_another_process(plan, tmp_path):
    """Another process applies the file without solving and gets the same gradients."""
    plan.save(tmp_path / "plan.json")
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "plan.json", tmp_path / "grads.pt"],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "123"},
    )
    model = make()
    torch.manual_seed(1)
    square(model(sample(1), 0.5)).backward()
    for name, gradient in torch.load(tmp_path / "grads.pt").items():
        assert torch.equal(gradient, model.get_parameter(name).grad), name


# -- writing ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(plan, tmp_path, monkeypatch, stage):
    """Whatever fails on the way, the old file is whole and nothing else lies about."""
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="no space left"):
        plan.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    """A plan for a call with an opaque argument cannot be saved; the error names its type."""

    class Scaled(Net):
        def forward(self, x, factor):
            return super().forward(x) * factor.value

    class Factor:
        value = 2.0

    plan = optimize(make(Scaled), (sample(), Factor()), budget_gb=1, loss_fn=square)
    with pytest.raises(PlanError, match="Factor"):
        plan.save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_an_oserror(plan, tmp_path):
    """Saving where there is no folder."""
    with pytest.raises(FileNotFoundError):
        plan.save(tmp_path / "none" / "plan.json")


def test_the_file_can_be_read_by_others(plan, tmp_path):
    """A plan has the permissions of any other new file."""
    plan.save(tmp_path / "plan.json")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "other").stat().st_mode


# -- reading ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not JSON"),
        (b"\x80\x02}q\x00.", "not JSON"),
        (b"\x00" * 100, "not JSON"),
        (b"{", "not JSON"),
        (b"null", "schema_version is None"),
        (b"[]", "schema_version is None"),
        (b'"plan"', "schema_version is None"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": Infinity}', "Infinity"),
        (b'{"schema_version": 3}', "schema_version is 3, this version reads 2"),
        (b'{"schema_version": 2}', "required"),
        (b'{"schema_version": true}', "schema_version"),
        (b'{"schema_version": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_plan_is_refused(content, named, tmp_path):
    """The error names the file and the cause."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=named) as caught:
        Plan.load(path)
    assert "plan.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_truncated_files_are_refused(written, tmp_path):
    """Wherever a file ends too early, it is no plan."""
    text = json.dumps(written)
    path = tmp_path / "plan.json"
    for end in range(0, len(text), len(text) // 20):
        path.write_text(text[:end])
        with pytest.raises(PlanError, match="not JSON"):
            Plan.load(path)


def test_a_missing_file_and_a_folder_are_oserrors(tmp_path):
    """What cannot be opened is the system's own error."""
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(IsADirectoryError):
        Plan.load(tmp_path)


def _set(*path: str | int, to: Any) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def test_deep_nesting_is_refused(written, tmp_path):
    """Arguments nested deeper than Python's stack are no crash."""
    data = copy.deepcopy(written)
    data["call"]["arguments"] = {"dict": {"x": "HERE"}}
    for depth in (200, 480, 5000):
        nested = '{"list": [' * depth + '{"value": 1}' + "]}" * depth
        (tmp_path / "plan.json").write_text(json.dumps(data).replace('"HERE"', nested))
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "plan.json")


def _swap(data: dict) -> None:
    data["schedule"][0], data["schedule"][-1] = data["schedule"][-1], data["schedule"][0]


def _cycle(data: dict) -> None:
    reads = data["operators"][0]["inputs"]
    reads.append(data["operators"][-2]["outputs"][0] if data["operators"][-2]["outputs"] else 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("extra", to=1), "extra"),
        (_set("solver", "extra", to=1), "extra"),
        (_set("operators", 0, "extra", to=1), "extra"),
        (_set("budget_bytes", to=-1), "budget_bytes"),
        (_set("budget_bytes", to=0.5), "budget_bytes"),
        (_set("budget_bytes", to="1"), "budget_bytes"),
        (_set("budget_bytes", to=True), "budget_bytes"),
        (_set("budget_bytes", to=10**30), "budget_bytes"),
        (_set("budget_bytes", to=1000), "above the budget of 1000"),
        (_set("schedule", to=[]), "never run"),
        (_set("schedule", 0, to=10**6), "names no operator"),
        (_set("schedule", 0, to=-1), "schedule"),
        (_set("schedule", 0, to=None), "schedule"),
        (_set("schedule", 0, to=1.0), "schedule"),
        (_swap, "schedule does not compute"),
        (_cycle, "not|no|fingerprint"),
        (_set("storages", 0, "size_bytes", to=4), "fingerprint"),
        (_set("storages", 0, "size_bytes", to=-4), "size_bytes"),
        (_set("storages", 0, "size_bytes", to=2**60), "size_bytes"),
        (_set("storages", 0, "category", to="secret"), "category"),
        (_set("storages", 0, "producer", to=10**6), "."),
        (_set("operators", 0, "target", to="os.system"), "fingerprint"),
        (_set("operators", 0, "inputs", to=[10**6]), "."),
        (_set("operators", 0, "cost_ns", to=-1), "cost_ns"),
        (_set("operators", to=[]), "operators"),
        (_set("operators", to={}), "operators"),
        (_set("fingerprint", to="0" * 32), "fingerprint"),
        (_set("fingerprint", to="xyz"), "fingerprint"),
        (_set("solver", "status", to="best"), "status"),
        (_set("solver", "lower_bound_us", to=-1), "lower_bound_us"),
        (_set("solver", "lower_bound_us", to=1e300), "lower_bound_us"),
        (_set("prediction", "peak_bytes", to=1), "peak_bytes"),
        (_set("prediction", "step_us", to=1), "step_us"),
        (_set("prediction", "overhead", to=0.0), "overhead"),
        (_set("prediction", "baseline_step_us", to=1.0), "overhead"),
        (_set("loss", "differentiated", to=[]), "differentiated"),
        (_set("loss", "label", to="eval"), "label"),
        (_set("call", "autocast", to="os"), "not a dtype"),
        (_set("call", "autocast", to="nn"), "not a dtype"),
        (_set("call", "arguments", to={"value": 1}), "arguments"),
        (_set("call", "arguments", to={"dict": {"x": {"dtype": "load"}}}), "not a dtype"),
        (_set("call", "arguments", to={"dict": {"x": {"code": "1"}}}), "arguments"),
        (_set("call", "arguments", "dict", "x", "tensor", "dtype", to="__doc__"), "not a dtype"),
        (_set("call", "arguments", "dict", "x", "tensor", "shape", to=[-1]), "shape"),
        (_set("call", "arguments", "dict", "x", "tensor", "stride", to=[1]), "stride"),
        (_set("call", "arguments", "dict", "x", "tensor", "device", to="disk"), "device"),
        (_set("device_type", to="disk"), "device_type"),
        (_set("optimizer", "state_bytes", to=-1), "optimizer"),
        (_set("rules", "never_recompute", to="all"), "never_recompute"),
    ],
)
def test_a_damaged_plan_is_refused(written, tmp_path, change, named):
    """One change to a good file gives a PlanError that names what is wrong."""
    data = copy.deepcopy(written)
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=named) as caught:
        Plan.load(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", sorted(schema()["required"]))
def test_every_key_is_needed(written, key):
    """A file that lacks a part is refused and the part is named."""
    data = {k: v for k, v in written.items() if k != key}
    with pytest.raises(PlanError, match=key):
        plan_from_dict(data)


def test_wrong_types_anywhere_are_plan_errors(written):
    """Each value in turn replaced by one of another kind never escapes as another error."""

    inner = [(part, key) for part in ("call", "loss", "solver") for key in written[part]]
    for path in [*((k,) for k in written), *inner]:
        data = copy.deepcopy(written)
        _set(*path, to={"unexpected": []})(data)
        with pytest.raises(PlanError):
            plan_from_dict(data)


def test_an_oversized_file_is_refused(plan, tmp_path, monkeypatch):
    """The size is looked at before anything is read."""
    path = tmp_path / "plan.json"
    plan.save(path)
    monkeypatch.setattr("planner.saving.serialize.MAX_FILE_BYTES", 100)
    with pytest.raises(PlanError, match="at most 100"):
        Plan.load(path)


class _Priced(torch.nn.Linear):
    """Wide enough that AdamW's step takes longer than a launch."""

    def __init__(self) -> None:
        super().__init__(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu().sum()


@pytest.mark.slow
def test_a_loaded_plan_plans_another_shape_like_a_fresh_one(tmp_path: Path) -> None:
    """The file knows the device of the table and what the optimizer's step takes."""
    model, x = _Priced(), torch.ones(64, 256)
    fresh = optimize(model, x, budget_gb=1, optimizer="adamw", device="h100")
    fresh.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert (loaded.device_name, loaded.optimizer) == ("h100", fresh.optimizer)
    again = [
        replan(plan, plan._live, model, {"x": torch.ones(32, 256)}, model.forward)[0]
        for plan in (fresh, loaded)
    ]
    assert again[0].costs.device == again[1].costs.device == fresh.costs.device
    assert again[0].predicted_step_us == again[1].predicted_step_us
    found = [plan.max_batch(model, x, largest=2).plan.costs.device for plan in (fresh, loaded)]
    assert found == [fresh.costs.device] * 2


def test_a_file_of_before_has_no_name_of_a_device() -> None:
    """Such a file of version 2 is read, for the place where the model lies."""
    data = json.loads(
        json.dumps(plan_to_dict(optimize(_Priced(), torch.ones(2, 256), budget_gb=1)))
    )
    del data["device_name"]
    assert plan_from_dict(data).device_name is None


def test_a_loaded_plan_with_times_of_the_users_own_is_not_planned_again(tmp_path: Path) -> None:
    """No file holds a function, so that another shape is an error and not priced otherwise."""
    model = _Priced()
    plan = optimize(model, torch.ones(2, 256), budget_gb=1, cost_model=lambda _call: 1.0)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"which is not in the file"):
        replan(loaded, None, model, {"x": torch.ones(3, 256)}, model.forward)


def test_a_file_that_is_not_there_says_the_next_step(tmp_path):
    """It is still a FileNotFoundError, and names the file and what writes one."""
    with pytest.raises(FileNotFoundError, match=r"plan.save.*absent.json"):
        Plan.load(tmp_path / "absent.json")


def test_names_that_scripts_know() -> None:
    """Scripts outside of this repository import these two by their first places."""
    from planner.application import applied_plan
    from planner.serialize import plan_from_dict, plan_to_dict

    plan = plan_for(make(), sample(), loss_fn=square)
    read = json.loads(json.dumps(plan_to_dict(plan)))
    assert plan_from_dict(read).fingerprint == plan.fingerprint
    assert applied_plan(make()) is None
