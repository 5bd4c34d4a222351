"""Throw-away certificates: an authority, a server's and a client's."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey
SUBJECT: Final = "CN=caxev-lngs,OU=sites,O=Test"
"""The client's, as MongoDB writes it."""


@frozen
class Certificates:
    """Files: the authority's certificate; server and client with their keys."""

    authority: Path
    server: Path
    client: Path


def make_certificates(directory: Path) -> Certificates:
    """Make them in a directory."""
    key, name = _key(), _name("Test authority", "authority")
    root = _sign(name, key, name, key, authority=True)
    made = Certificates(*(directory / f"{one}.pem" for one in ("authority", "server", "client")))
    made.authority.write_bytes(_pem(root))
    for path, subject in (
        (made.server, _name("localhost", "servers")),
        (made.client, _name("caxev-lngs", "sites")),
    ):
        own = _key()
        path.touch(mode=0o600)
        path.write_bytes(_private(own) + _pem(_sign(subject, own, name, key, authority=False)))
    return made


def _key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def _name(common: str, unit: str) -> x509.Name:
    parts = {NameOID.ORGANIZATION_NAME: "Test", NameOID.ORGANIZATIONAL_UNIT_NAME: unit}
    parts[NameOID.COMMON_NAME] = common
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])


def _sign(
    subject: x509.Name, key: Key, issuer: x509.Name, by: Key, *, authority: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if not authority:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return builder.sign(by, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
