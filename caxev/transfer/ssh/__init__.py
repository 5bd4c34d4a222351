"""Move copies between this machine and others over SSH: the only package that imports asyncssh.

`pull`, `push`, `remote_manifest` and `check` are plain functions that run in a worker process. They
raise `caxev.core.job.Retry` and `GiveUp` only.
"""

from caxev.transfer.ssh.endpoint import Endpoint
from caxev.transfer.ssh.landing import (
    Landing,
    free_there,
    land_there,
    look_there,
    only_pusher,
    publish_there,
)
from caxev.transfer.ssh.mover import check, pull, push, remote_manifest
from caxev.transfer.ssh.openssh import host_name, shell
from caxev.transfer.ssh.plan import STREAMS, Transfer
from caxev.transfer.ssh.sites import endpoint_of

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
