"""The files that go to browsers as they are."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Final

KINDS: Final = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icons.svg": "image/svg+xml",
    "favicon.svg": "image/svg+xml",
}


@cache
def asset(name: str) -> bytes:
    """Return a file by its name."""
    return files("caxev.web").joinpath("static", name).read_bytes()


@cache
def assets_version() -> str:
    """Return a text that changes with the files, so that a browser fetches them again."""
    return blake2b(b"".join(map(asset, KINDS)), digest_size=6).hexdigest()
