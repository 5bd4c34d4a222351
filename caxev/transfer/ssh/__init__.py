"""Move copies between this machine and others over SSH: the only package that imports asyncssh.

Its functions run in a worker process, and raise `caxev.core.errors.Retry` and `GiveUp` only.
"""

from caxev.transfer.ssh.endpoint import Endpoint, endpoint_of
from caxev.transfer.ssh.landing import in_session, land, only_pusher, publish
from caxev.transfer.ssh.mover import SshMover
from caxev.transfer.ssh.openssh import host_name, shell
from caxev.transfer.ssh.remote import Remote

__all__ = [
    "Endpoint",
    "Remote",
    "SshMover",
    "endpoint_of",
    "host_name",
    "in_session",
    "land",
    "only_pusher",
    "publish",
    "shell",
]
