"""Moving copies between this machine and others over SSH: the only code that knows asyncssh.

`pull`, `push`, `remote_manifest` and `check` are plain functions that run in a worker process. They
raise `caxev.job.Retry` and `GiveUp` only.
"""

from caxev.ssh.endpoint import Endpoint
from caxev.ssh.mover import check, pull, push, remote_manifest
from caxev.ssh.plan import Moved, Piece, Plan, Transfer, plan
from caxev.ssh.sites import SERVED, endpoint_of, transfer_between

__all__ = [
    "SERVED",
    "Endpoint",
    "Moved",
    "Piece",
    "Plan",
    "Transfer",
    "check",
    "endpoint_of",
    "plan",
    "pull",
    "push",
    "remote_manifest",
    "transfer_between",
]
