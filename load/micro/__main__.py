"""`python -m load.micro`: every bench_*.py of this folder. What follows goes to pytest, such as `-k registry`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from load.harness import heading
from load.machine import pin_self
from load.run import ROOT

OPTIONS = (
    "--benchmark-only",
    "--benchmark-disable-gc",
    "--benchmark-sort=name",
    "--benchmark-group-by=group",
    "--benchmark-columns=min,median,iqr,rounds",
    "--benchmark-max-time=0.3",
    "--benchmark-warmup=on",
    "--benchmark-warmup-iterations=100",
    "--no-header",
    "-q",
    "-p",
    "no:cacheprovider",
    "-o",
    "python_files=bench_*.py",
    "-o",
    "python_functions=bench_*",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, given = parser.parse_known_args()
    pin_self()
    print(heading("parts of a call, in process"), flush=True)
    os.chdir(ROOT)
    here = str(Path(__file__).parent)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *OPTIONS, *given, here])


if __name__ == "__main__":
    main()
