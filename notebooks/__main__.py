"""Execute the notebooks from clean: ``make notebooks``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nbclient.exceptions import CellExecutionError, CellTimeoutError

from .execution import FOLDER, execute, kinds, paths, problems, read, write


def main() -> None:
    """Execute notebooks, each in a fresh kernel, and write their outputs back."""
    parser = argparse.ArgumentParser(prog="python -m notebooks", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="such as 1_quickstart.ipynb; by default all")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail where other kinds of outputs come than are committed",
    )
    options = parser.parse_args()
    chosen = [FOLDER / name for name in options.names] or paths()
    failures = [
        f"{path.name}: {problem}"
        for path in chosen
        for problem in _run(path, write_back=not options.check)
    ]
    if failures:
        raise SystemExit("\n".join(failures))


def _run(path: Path, *, write_back: bool) -> list[str]:
    begin_s = time.monotonic()
    try:
        fresh = execute(path)
    except (CellExecutionError, CellTimeoutError) as error:
        return [str(error)]
    print(f"{path.name}: {time.monotonic() - begin_s:.0f} s", flush=True)
    found = list(problems(fresh))
    if write_back and not found:
        write(fresh, path)
    if not write_back and kinds(fresh) != kinds(read(path)):
        found.append(f"outputs are {kinds(fresh)}, committed are {kinds(read(path))}")
    return found


if __name__ == "__main__":
    main()
