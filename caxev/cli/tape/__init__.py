"""Run ``caxev tape``: list copies on tape, and make, restore, check and forget them.

`put`, `get` and `check` write requests to which the listeners react. `ls`, `status` and
``get --to DIR`` call the archive's client, so they need a machine that has it. `forget` removes an
entry from the database; nothing on tape is ever deleted.
"""

from caxev.cli.tape import look, request
from caxev.cli.tape.archive import tape

__all__ = ["look", "request", "tape"]
