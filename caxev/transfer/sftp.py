"""Serve the methods ``sftp`` and ``scp`` through `caxev.transfer.ssh`."""

from __future__ import annotations

from caxev.config import Site, link_between
from caxev.files import Manifest, Moved, Report
from caxev.transfer import ssh
from caxev.transfer.base import Route


class Sftp:
    """Moves copies over SSH; see `caxev.transfer.base.Mover`."""

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Fetch a copy from there."""
        return ssh.pull(_transfer(route), report=report)

    def push(self, route: Route, *, report: Report) -> Moved:
        """Send a copy there."""
        return ssh.push(_transfer(route), report=report)

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Read a copy back from there."""
        return ssh.remote_manifest(_transfer(route), report=report)

    def check(self, here: Site, there: Site) -> str:
        """Connect and start SFTP."""
        return ssh.check(ssh.endpoint_of(here, there))


def _transfer(route: Route) -> ssh.Transfer:
    here, there = route.here, route.there
    return ssh.Transfer(
        endpoint=ssh.endpoint_of(here, there),
        remote_path=route.remote_path,
        remote_roots=there.roots,
        local_path=route.local_path,
        local_roots=here.roots,
        nstreams=link_between(here, there).nstreams or ssh.STREAMS,
        agent=there.receiver,
        expected=route.expected,
        max_rate=route.max_rate,
        min_free=route.min_free,
        again=route.again,
        found=route.found,
        checksum=route.checksum,
    )
