"""Serve the methods ``sftp`` and ``scp``."""

from __future__ import annotations

from caxev import aio
from caxev.config import Site
from caxev.core.errors import Retry
from caxev.files import Manifest, Meter, Moved, Report, plan, printable
from caxev.transfer.base import Route
from caxev.transfer.receive import manifest_from
from caxev.transfer.ssh.agent import shaped
from caxev.transfer.ssh.digests import assembled
from caxev.transfer.ssh.endpoint import Endpoint, connected, endpoint_of, started, translated
from caxev.transfer.ssh.pulling import pull
from caxev.transfer.ssh.pushing import push
from caxev.transfer.ssh.work import Work, asking, run


class SshMover:
    """Move copies over SSH; see `caxev.transfer.base.Mover`.

    Files keep their times; modes are 0644 and 0755. Raises `Damaged` if the source does not match
    the manifest.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Fetch a copy from there."""
        return aio.run(run(route, pull, report, asking(route, do="send")))

    def push(self, route: Route, *, report: Report) -> Moved:
        """Send a copy there."""
        return aio.run(push(route, report))

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Have ``caxev receive`` read the copy there if it can be started; else read it back."""
        request = asking(route, do="digest", max_rate=route.max_rate)
        return aio.run(run(route, _manifest, report, request))

    def check(self, here: Site, there: Site) -> str:
        """Connect, start SFTP; return the server's version and home directory."""
        return aio.run(_check(endpoint_of(here, there)))


async def _check(endpoint: Endpoint) -> str:
    async with connected(endpoint) as connection:
        sftp = await started(endpoint, connection)
        with translated(endpoint):
            home = await sftp.realpath(b".")
        return f"{connection.get_extra_info('server_version')}, in {printable(home)}"


async def _manifest(work: Work) -> Manifest:
    work = await work.with_agent()
    if work.agent is not None:
        while "manifest" not in (answer := await work.agent.answer()):
            with shaped(work.agent.endpoint):
                work.report(int(answer["done"]), int(answer["total"]))
        with shaped(work.agent.endpoint):
            return manifest_from(answer["manifest"])
    path = await work.confined()
    source = await work.remote.source(path)
    meter = Meter.of(source, work.report)
    digests = await work.move("read", (None, path), plan(source, ()).pieces, meter, ordered=False)
    if await work.remote.source(path) != source:
        raise Retry(f"{work.remote.shown(path)} changed while it was read")
    manifest = assembled(source, digests)
    assert manifest is not None
    return manifest
