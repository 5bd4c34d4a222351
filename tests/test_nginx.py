"""The example for nginx, on a real one: who is let in, under which name, and from which page."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Final

import pytest

from caxev.testing.mongod import start_with_us
from tests.certificates import make_certificates
from tests.mongod import Cluster
from tests.page import Answer, serving

pytestmark = pytest.mark.replicaset
EXAMPLE: Final = Path(__file__).parents[1] / "deploy" / "nginx.conf.example"
NAME: Final = "caxev.example.org"
FRAME: Final = """daemon off; pid {0}/pid; error_log {0}/error.log; user root;
events {{}}
http {{ access_log off; {1}
{2} }}"""


@contextmanager
def nginx(directory: Path, upstream: str) -> Iterator[int]:
    """The example's server at a free port of loopback."""
    if (program := shutil.which("nginx")) is None:
        pytest.skip("nginx is not installed")
    certificate = make_certificates(directory).server
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    (directory / "htpasswd").write_text("anna:{PLAIN}a\nbert:{PLAIN}b\n")
    text = EXAMPLE.read_text()
    for pattern, instead in (
        (r"listen 443", f"listen 127.0.0.1:{port}"),
        (r"/etc/ssl/\S+(?=;)", str(certificate)),
        (r"/etc/nginx/caxev.htpasswd", str(directory / "htpasswd")),
        (r"http://127.0.0.1:8765", upstream),
    ):
        text, number = re.subn(pattern, instead, text)
        assert number, pattern
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    (directory / "nginx.conf").write_text(FRAME.format(directory, places, text))
    server = start_with_us([program, "-c", str(directory / "nginx.conf"), "-p", str(directory)])
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None, (directory / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(240)


def ask(port: int, path: str, login: str = "", body: str = "", **headers: Any) -> Answer:
    """Ask nginx as a browser does that has logged in."""
    context = ssl._create_unverified_context()
    sent = {"Host": NAME, **{name.replace("_", "-"): one for name, one in headers.items()}}
    if login:
        sent["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    connection = HTTPSConnection("127.0.0.1", port, context=context, timeout=240)
    connection.request("POST" if body else "GET", path, body or None, sent)
    found = connection.getresponse()
    answer = Answer(found.status, found.headers, found.read().decode())
    connection.close()
    return answer


def test_people_come_through_nginx(mongod: Cluster, tmp_path: Path) -> None:
    """Its login names them, whatever a browser sends; forms are taken from its address."""
    (line,) = re.findall(r"#   caxev web (.*?)\n# on", EXAMPLE.read_text(), re.DOTALL)
    options = shlex.split(line.replace("\n#", " "))
    environ = {"CAXEV_MONGO_OPERATOR_URI": mongod.uri}
    with (
        serving(tmp_path, mongod.uri, "page_of_nginx", *options, environ=environ) as page,
        nginx(tmp_path, page.address) as port,
    ):
        assert ask(port, "/").status == 401
        anna = ask(port, "/", "anna:a")
        assert "anna, operator" in anna.text
        cookie = anna.headers["set-cookie"].partition(";")[0]
        assert cookie.startswith("__Host-")
        forged = {"x_caxev_user": "anna", "x_caxev_groups": "operators"}
        assert "bert, reader" in ask(port, "/", "bert:b", **forged).text
        assert ask(port, "/acts/retry", "bert:b", **forged).status == 403
        form = {"content_type": "application/x-www-form-urlencoded", "cookie": cookie}
        for origin, words in (
            (f"https://{NAME}", "not of your session"),
            (f"http://{NAME}", "by --address"),
        ):
            answer = ask(port, "/acts/retry", "anna:a", "token=x", origin=origin, **form)
            assert (answer.status, words in answer.text) == (403, True), answer.text
