"""One of the processes of the ``two processes`` rule: ``python -m diffstill.checks.worker TARGET OPTIONS FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .bench import Bench
from .targets import find_method


def main(target: str, options: str, folder: str) -> None:
    bench = Bench(find_method(target), json.loads(options))
    try:
        bench.trainer(Path(folder)).run()
    finally:
        bench.runtime.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
