"""Which modules of a model are its blocks."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import PlanError

AUTO = "auto"


def find_blocks(model: nn.Module, blocks: str | Sequence[str]) -> tuple[str, ...]:
    """Return the paths of a model's blocks, in the order of ``named_modules``.

    Parameters
    ----------
    blocks
        A pattern of module paths, or several. ``*`` stands for one part of a path or for
        several characters of it, never for a dot. ``"auto"`` takes the elements of the
        model's lists of modules: of nested ones the outermost.

    Raises
    ------
    ValueError
        When it is neither, or a pattern matches nothing.
    PlanError
        When there are none, or one lies inside another.

    Examples
    --------
    >>> net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    >>> find_blocks(net, "layers.*")
    ('layers.0', 'layers.1')
    """
    patterns: tuple[str, ...] = ()
    if isinstance(blocks, Iterable):
        patterns = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    if patterns == (AUTO,):
        return _automatic(model)
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(
            "blocks is a pattern of module paths such as 'model.layers.*', or 'auto'; got "
            f"{blocks!r}"
        )
    if AUTO in patterns:
        named = ", ".join(repr(pattern) for pattern in patterns if pattern != AUTO)
        raise ValueError(
            f"'{AUTO}' chooses all blocks by itself and cannot be joined with {named}: give "
            f"'{AUTO}' alone, or leave it out"
        )
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for pattern in patterns:
        matching = [path for path in paths if _matches(path, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            raise ValueError(
                f"no module of this {type(model).__name__} is at {pattern!r}"
                + (f"; there is {near[0]!r}" if near else "")
            )
        found += matching
    chosen = [path for path in paths if path in set(found)]
    for outer in chosen:
        inner = next((path for path in chosen if path.startswith(f"{outer}.")), None)
        if inner is not None:
            raise PlanError(f"block {inner!r} lies inside block {outer!r}: name one of the two")
    return tuple(chosen)


def _matches(path: str, pattern: str) -> bool:
    """Whether each part of a path fits the same part of the pattern."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def has_blocks(model: nn.Module) -> bool:
    """Whether ``"auto"`` finds blocks in a model."""
    return bool(_lists_in(model))


def smaller_blocks(
    model: nn.Module, paths: tuple[str, ...], unfit: Collection[str]
) -> tuple[str, ...]:
    """Return the blocks without those that are not fit, but with the parts inside of these.

    The parts are the elements of its lists of layers, or else its own composed modules, such
    as the attention of a layer whose experts cannot be planned.
    """
    chosen = {path for path in paths if path not in unfit}
    for outer in unfit:
        module = model.get_submodule(outer)
        chosen |= {f"{outer}.{path}" for path in _lists_in(module) or _parts_of(module)}
    return tuple(path for path, _ in model.named_modules() if path in chosen)


def _automatic(model: nn.Module) -> tuple[str, ...]:
    found = _lists_in(model)
    if not found:
        raise PlanError(f"this {type(model).__name__} has no list of layers: {_what_else(model)}")
    return tuple(found)


def _what_else(model: nn.Module) -> str:
    """What to do with a model in which no blocks are found."""
    parts = _parts_of(model)
    while len(parts) == 1:  # a wrapper around the model
        inner = _parts_of(model.get_submodule(parts[0]))
        if not inner:
            break
        parts = [f"{parts[0]}.{part}" for part in inner]
    if not parts:
        return "plan its whole step, without blocks="
    return f"name its blocks, for instance blocks={parts}"


def _lists_in(model: nn.Module) -> list[str]:
    """The elements of lists of modules, of nested ones the outermost."""
    found: list[str] = []
    for path, module in model.named_modules():
        if any(path == outer or path.startswith(f"{outer}.") for outer in found):
            continue
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        if is_list and all(map(_is_composed, module.children())):
            prefix = f"{path}." if path else ""
            found += [f"{prefix}{name}" for name, _ in module.named_children()]
    return found


def _parts_of(module: nn.Module) -> list[str]:
    """The composed modules directly inside of one, those in lists and dicts included."""
    found: list[str] = []
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # these are not called
            found += [f"{name}.{path}" for path in _parts_of(child)]
        elif _is_composed(child):
            found.append(name)
    return found


def _is_composed(module: nn.Module) -> bool:
    """Whether a module is trained and made of others."""
    trained = any(p.requires_grad for p in module.parameters())
    return trained and any(True for _ in module.children())
