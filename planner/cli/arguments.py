"""Read and check the arguments of ``remat``'s commands."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.costs.devices import DEVICES
from graph_capture.loop.loop_holds import LoopHolds

from ..block_plan import BlockPlan
from ..blocks.block_files import is_block_plan
from ..errors import PlanError
from ..plan import Plan
from .answers import fail

Target = Annotated[
    str,
    typer.Argument(help="module:function that returns (model, sample_input) or those and loss_fn"),
]
OptimizerName = Annotated[str | None, typer.Option(help="count its state and step, e.g. adamw")]
DeviceName = Annotated[
    str | None,
    typer.Option(help=f"where it will run, if not here: {', '.join(DEVICES)}"),
]
PlanFile = Annotated[Path, typer.Argument(help="a plan file, as remat plan --out writes it")]
Autocast = Annotated[str | None, typer.Option(help="bfloat16 or float16")]
CostModelName = Annotated[str, typer.Option(help="roofline (data sheets) or profile (timed)")]
Headroom = Annotated[
    str | None, typer.Option(help="part of the budget to leave alone, e.g. 5% or 2GB")
]

OutputsWord = Annotated[
    str, typer.Option(help="held to the end of the step, or released once the loss is there")
]
GradsWord = Annotated[
    str,
    typer.Option(
        help="none when the step begins, accumulated from earlier ones, or consumed as they arrive"
    ),
]
Resident = Annotated[
    str, typer.Option(help="what else of yours is on the device all the while: bytes, or e.g. 2GB")
]

Around = Annotated[
    str | None,
    typer.Option(
        help="ddp, or e.g. ddp:gradient_as_bucket_view: the wrapper it trains in; with blocks "
        "fsdp2:ranks=8, one rank's memory"
    ),
]

Blocks = Annotated[
    str | None,
    typer.Option(
        help="plan inside the modules of these paths, e.g. 'model.layers.*' or auto, and leave all "
        "else as it is; several with commas"
    ),
]

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


_BUILDS = (
    "give module:function, where the function takes no arguments and returns "
    "(model, sample_input) or (model, sample_input, loss_fn)"
)


def load_object(target: str, wanted: str = "give module:function") -> Any:
    """Return what ``module:name`` names; modules in the current folder are found, too.

    ``wanted`` ends the message where there is no such thing.
    """
    module_name, _, name = target.partition(":")
    if not name:
        fail(f"{target!r} is not of the form module:function; {wanted}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # "" and "." as modules
        fail(f"{target}: {error}; {wanted}")
    finally:
        sys.path.pop(0)


def load_target(target: str) -> tuple[nn.Module, Any, Callable[[Any], Any] | None]:
    """Call ``module:function``."""
    function = load_object(target, _BUILDS)
    if not callable(function):
        fail(f"{target} is a {type(function).__name__}, which cannot be called; {_BUILDS}")
    return model_and_sample(target, function, _BUILDS)


def model_and_sample(
    target: str, function: Callable[..., Any], wanted: str, *given: Any
) -> tuple[nn.Module, Any, Callable[[Any], Any] | None]:
    """Call what ``target`` names; check what it takes and what it returns."""
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        fail(f"{target}: {error}; {wanted}")
    except ValueError:
        pass  # a function in C has no signature to look at
    sys.path.insert(0, str(Path.cwd()))  # for what it imports
    try:
        made = function(*given)
    except (ImportError, AttributeError) as error:
        fail(f"{target}: {error}")
    finally:
        sys.path.pop(0)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        fail(f"{target} must return (model, sample_input) or (model, sample_input, loss_fn)")
    model, sample_input, loss_fn = made if len(made) == 3 else (*made, None)
    try:
        bind_call(model.forward, *split_sample(sample_input))
    except (TypeError, ValueError) as error:
        fail(
            f"{target}: the sample does not fit the call of its {type(model).__name__}: {error}; "
            "it is a tensor, a tuple of positional arguments or a dict of keyword arguments"
        )
    return model, sample_input, loss_fn


def check_file(option: str, path: Path | None) -> None:
    """End the command where a file could not be written, before anything is planned."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        fail(f"{option}: there is no folder {path.parent}: make it first")
    if path.is_dir():
        fail(f"{option} is a file, and {path} is a folder")


def check_folder(option: str, path: Path | None) -> None:
    """The same of a folder, which may yet be made."""
    if path is not None and path.exists() and not path.is_dir():
        fail(f"{option} is a folder, and {path} is a file")


def read_names(text: str | None) -> tuple[str, ...] | None:
    """Split ``"a,b"`` into its parts; ``None`` where the option was not given."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def read_integers(option: str, text: str) -> tuple[int, ...]:
    """Read ``"1,2,4"`` as positive integers."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isascii() or not part.isdigit() or int(part) < 1]
    if wrong:
        fail(f"{option} takes whole numbers from 1 on, such as 1,2,4, got {text!r}")
    return tuple(int(part) for part in parts)


def read_autocast(text: str | None) -> torch.dtype | None:
    """Return autocast's dtype by name."""
    if text is None:
        return None
    if text not in _DTYPES:
        fail(f"--autocast is one of {', '.join(_DTYPES)}, got {text!r}")
    return _DTYPES[text]


def read_holds(outputs: str, grads: str, resident: str, distributed: str | None) -> dict[str, Any]:
    """Return what the loop holds, as keyword arguments."""
    resident_bytes: int | str = (
        int(resident) if resident.isascii() and resident.isdigit() else resident
    )
    try:
        holds = LoopHolds.of(outputs, grads, resident_bytes, distributed=distributed)
    except ValueError as error:
        fail(f"{error}".replace("resident_bytes", "--resident"))
    named = ("outputs", "grads", "resident_bytes")
    return {**{name: getattr(holds, name) for name in named}, "distributed": holds.around}


def read_blocks(text: str | None) -> dict[str, Any]:
    """Return what says whether to plan inside blocks, as keyword arguments."""
    patterns = read_names(text)
    if patterns is None:
        return {}
    return {
        "granularity": "blocks",
        "blocks": patterns[0] if len(patterns) == 1 else patterns,
    }


def read_headroom(text: str | None) -> float | str | None:
    """Return a bare number as a number, everything else unchanged."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def save_plan(plan: Plan, path: Path) -> str:
    """Write ``plan`` to a file; says so."""
    try:
        plan.save(path)
    except (OSError, PlanError) as error:
        fail(str(error))
    return f"written to {path}"


def load_plan(path: Path) -> Plan:
    """Read a plan file, of a whole step or in blocks."""
    try:
        return BlockPlan.load(path) if is_block_plan(path) else Plan.load(path)
    except (PlanError, OSError) as error:
        fail(str(error))
