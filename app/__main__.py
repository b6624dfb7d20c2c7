"""`python -m app` and `agentcore-tools`: ended by signals from the first moment on, then the command line.

Imports take a second. SIGINT would end them by a traceback out of whatever is being imported, and SIGTERM not at all
where this is process 1 of a container: such a process is not ended by a signal that it does not handle.
"""

import os
import signal
from typing import NoReturn

ENDED_BY = 128
"""Plus a signal's number: what a shell shows for a program that the signal ended."""


def main() -> None:
    """Entry point of `agentcore-tools`."""
    # Stays: before `serve` can drain, and in every other command, SIGTERM would be lost.
    signal.signal(signal.SIGTERM, _end)
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, _end)
    from app import cli

    signal.signal(signal.SIGINT, on_interrupt)
    cli.main()


def _end(number: int, _: object) -> NoReturn:
    os._exit(ENDED_BY + number)


if __name__ == "__main__":
    main()
