"""What ``caxev`` and ``python -m caxev`` start."""

import sys


def main() -> None:
    """Run the command line; ``receive`` without it, as another site waits for that to start."""
    if sys.argv[1:2] == ["receive"]:
        from caxev import receive

        sys.exit(receive.main(sys.argv[2:]))
    from caxev.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
