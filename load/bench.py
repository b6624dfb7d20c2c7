"""`make bench`: the whole suite, one part after another, each a table; then the comparison with the baseline.

Each part is a command of its own (`python -m load.wire`, …), in a process of its own, which starts its servers and ends
them. PART=wire, or several with commas, runs only these. Exit 1: a part could not run, or something became slower.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from load.harness import command
from load.run import ROOT

PARTS: dict[str, list[str]] = {
    "wire": ["load.wire"],
    "headline": ["load.headline"],
    "capacity": ["load.capacity"],
    "profiles": ["load.profiles"],
    "micro": ["load.micro"],
    "growth": ["load.growth", "--plots", "var/bench"],
    "peers": ["load.peers"],
    "compare": ["load.compare"],
}
"""In the order in which they run, with what `make bench` gives them."""

WITHOUT_JSON = ("micro", "compare")


def chosen(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := set(parts) - PARTS.keys():
        raise argparse.ArgumentTypeError(f"no part {min(unknown)}; there are {', '.join(PARTS)}")
    return parts


def run(name: str, more: list[str], folder: Path | None) -> bool:
    """One part; whether it ended well. It shares the terminal, so Ctrl-C reaches it too."""
    module, *given = PARTS[name]
    kept = ["--json", str(folder / f"{name}.json")] if folder is not None and name not in WITHOUT_JSON else []
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", module, *given, *kept, *more], cwd=ROOT)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    print(f"{name}: {'done' if code == 0 else f'exit {code}'} in {time.monotonic() - began:.0f} s\n", flush=True)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="?", type=chosen, default=list(PARTS), help="names with commas; all")
    parser.add_argument("--json", type=Path, help="a folder for all figures, a file for each part")
    options, more = parser.parse_known_args()
    if more and len(options.parts) != 1:
        parser.error(f"{more[0]} goes to one part: name it")
    if options.json is not None:
        options.json.mkdir(parents=True, exist_ok=True)
    bad = [name for name in options.parts if not run(name, more, options.json)]
    if bad:
        print(f"not well: {', '.join(bad)}")
        sys.exit(1)


if __name__ == "__main__":
    command(main)
