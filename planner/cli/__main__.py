"""``python -m planner.cli``: the same as ``remat``."""

from . import main

if __name__ == "__main__":
    main()
