"""What ``caxev`` and ``python -m caxev`` start."""

import sys


def main() -> None:
    """Run the command line; without it what machines start: they wait for it, or do so often."""
    helping = not {"-h", "--help"}.isdisjoint(sys.argv)
    if sys.argv[1:2] == ["receive"] and not helping:
        from caxev import receive

        sys.exit(receive.main(sys.argv[2:]))
    if sys.argv[1:2] == ["batch"] and not helping:
        from caxev.batch import runner

        sys.exit(runner.main(sys.argv[2:]))
    from caxev.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
