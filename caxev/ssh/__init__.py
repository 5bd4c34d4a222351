"""Moving copies between this machine and others over SSH: the only code that knows asyncssh.

`pull`, `push`, `remote_manifest` and `check` are plain functions that run in a worker process. They
raise `caxev.job.Retry` and `GiveUp` only.
"""

from caxev.ssh.endpoint import Endpoint
from caxev.ssh.mover import check, pull, push, remote_manifest
from caxev.ssh.openssh import host_name, shell
from caxev.ssh.plan import STREAMS, Transfer
from caxev.ssh.sites import endpoint_of
from caxev.ssh.tree import (
    Landing,
    free_there,
    land_there,
    look_there,
    only_pusher,
    publish_there,
)

__all__ = [
    "STREAMS",
    "Endpoint",
    "Landing",
    "Transfer",
    "check",
    "endpoint_of",
    "free_there",
    "host_name",
    "land_there",
    "look_there",
    "only_pusher",
    "publish_there",
    "pull",
    "push",
    "remote_manifest",
    "shell",
]
