"""`python -m bench [NAME ...]`: measures, and prints a table each; all of them where none is named."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import bench


def main() -> int:
    known = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if not m.name.startswith("_"))
    wanted = sys.argv[1:] or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"there is no bench {', '.join(unknown)} (there are: {', '.join(known)})", file=sys.stderr)
        return 2
    for name in wanted:
        sys.argv = [f"python -m bench.{name}"]  # some have options of their own, for use by themselves
        importlib.import_module(f"bench.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
