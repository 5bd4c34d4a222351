"""The entry point of ``caxev`` and ``python -m caxev``."""

import atexit
import gc
import os
import sys


def main() -> None:
    """Run the command line; without it what machines start: they wait for it, or do so often."""
    _collect_rarely()
    _open_closed()
    helping = not {"-h", "--help"}.isdisjoint(sys.argv)
    if sys.argv[1:2] == ["receive"] and not helping:
        from caxev.transfer import receive

        sys.exit(receive.main(sys.argv[2:]))
    if sys.argv[1:2] == ["batch"] and not helping:
        from caxev.batch import runner

        sys.exit(runner.main(sys.argv[2:]))
    from caxev.cli import main as command_line

    command_line()


def _collect_rarely() -> None:
    """Have Python look for reference cycles less often, and not at the end.

    Imported modules stay: looking through them again and again, and once more before they are freed
    with the process, took a quarter of the processor time in which a listener starts and ends.
    """
    gc.set_threshold(5_000, 10, 10)
    atexit.register(gc.freeze)


def _open_closed() -> None:
    """Put /dev/null in place of standard streams that are closed.

    Else the next file or connection that is opened would get their number, and our messages.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # a descriptor
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()
