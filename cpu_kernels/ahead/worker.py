"""A program that compiles kernels for another process (builders.py): one a line of stdin, answered by an empty line.

Its argument is the folder of the store; an empty one stands for the user's cache.
"""

import json
import sys
from pathlib import Path

from cpu_kernels.team.store import KernelStore
from cpu_kernels.vectors.isa import choose


def main() -> None:
    """Compile what stdin names."""
    store = KernelStore(Path(sys.argv[1]) if sys.argv[1] else None)
    for line in sys.stdin:
        store.keep_compiled(*(choose(part["isa"]) if isinstance(part, dict) else part for part in json.loads(line)))
        print(flush=True)


if __name__ == "__main__":
    main()
