"""The compiled schema says of every file what ``jsonschema`` says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.blocks.block_files import read_json
from planner.saving import serialize
from planner.saving.compiled_schema import CompiledSchema
from planner.saving.serialize import plan_to_dict, schema
from tests.hostile import mutated
from tests.planner.blocks.small_blocks import small_plan


def _agree(data: Any, compiled: CompiledSchema) -> bool:
    expected = serialize._validator().is_valid(data)
    assert compiled.matches(data) == expected
    return expected


def test_damaged_plans_are_judged_alike() -> None:
    """Both ways, for edits of a plan."""
    written = json.loads(json.dumps(plan_to_dict(small_plan().parts.plans[0])))
    compiled = CompiledSchema(schema())
    assert _agree(written, compiled)
    judged = []
    for text in mutated(written, 80, seed=3):
        try:
            data = read_json(text)
        except ValueError:
            continue
        judged.append(_agree(data, compiled))
    assert 5 < sum(judged) < len(judged) - 5


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        ({"type": "integer"}, [1, 0], [1.0, True, "1", None]),
        ({"type": ["number", "null"]}, [1, 1.5, None], [True, "1"]),
        ({"const": 1}, [1, 1.0], [True, 2]),
        ({"enum": [None, "a", 0]}, [None, "a", 0], [False, "b"]),
        ({"minimum": 0, "maximum": 2}, [0, 2, "x"], [-1, 2.5]),
        ({"exclusiveMinimum": 0}, [0.1, 1], [0, -1]),
        ({"pattern": "^a"}, ["ab", 3], ["ba"]),
        ({"minItems": 1, "maxItems": 2, "items": {"type": "string"}}, [["a"], 3], [[], ["a", 1]]),
        (
            {"required": ["a"], "properties": {"a": {"type": "null"}}},
            [{"a": None}, 1],
            [{}, {"a": 1}],
        ),
        ({"additionalProperties": False, "properties": {"a": {}}}, [{}, {"a": 1}], [{"b": 1}]),
        ({"additionalProperties": {"type": "null"}}, [{"b": None}], [{"b": 1}]),
        ({"propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}]),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 2.5], [3, 1.5]),
        ({"$defs": {"n": {"type": "null"}}, "$ref": "#/$defs/n"}, [None], [1]),
    ],
)
def test_each_keyword_is_understood(part: Any, right: list[Any], wrong: list[Any]) -> None:
    """What matches and what does not, by hand."""
    compiled = CompiledSchema(part)
    assert [compiled.matches(data) for data in right] == [True] * len(right)
    assert [compiled.matches(data) for data in wrong] == [False] * len(wrong)


@pytest.mark.parametrize("part", [{"format": "date"}, {"items": {"contains": 1}}, {"const": [1]}])
def test_an_unknown_keyword_is_refused(part: dict[str, Any]) -> None:
    """And not passed over, at any depth."""
    with pytest.raises(ValueError, match="cannot be compiled"):
        CompiledSchema(part)
