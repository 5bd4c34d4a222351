"""``python -m caxev`` is ``caxev``."""

from caxev.cli import main

if __name__ == "__main__":
    main()
