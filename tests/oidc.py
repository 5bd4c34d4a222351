"""A simulator of an OpenID provider, on loopback: discovery, authorize, token, userinfo, keys.

It is no provider: whoever comes is logged in at once as `user`. It checks what a provider checks of
a client (redirect address, secret, PKCE, a code's single use), and signs with a key of its own.
`lies` has it answer wrongly, as an attacker between would.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from attrs import define, field
from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT, SECRET = "caxev-page", "s3cret/of:the page"


@define(eq=False)
class OidcSimulator:
    """What the simulator knows. `user`: the claims about who logs in."""

    issuer: str = ""
    user: dict[str, Any] = field(factory=lambda: {"sub": "u1", "preferred_username": "anna"})
    lies: dict[str, Any] = field(factory=dict)
    secret: str = SECRET
    key: RSAKey = field(factory=lambda: RSAKey.generate_key(2048, {"kid": "one"}))
    codes: dict[str, dict[str, str]] = field(factory=dict)
    tokens: set[str] = field(factory=set)
    asked: list[str] = field(factory=list)

    def get(self, path: str, query: dict[str, str], headers: Mapping[str, str]) -> Any:
        """Answer: an object, or an address to go to."""
        if path == "/.well-known/openid-configuration":
            return self._discovery()
        if path == "/keys":
            return {"keys": [self.key.as_dict(private=False)]}
        if path == "/authorization_endpoint":
            return self._authorize(query)
        assert path == "/userinfo_endpoint", path
        assert headers["authorization"].removeprefix("Bearer ") in self.tokens
        return self.user | self.lies.get("userinfo", {})

    def _discovery(self) -> dict[str, Any]:
        names = ("authorization_endpoint", "token_endpoint", "userinfo_endpoint")
        known = {name: f"{self.issuer}/{name}" for name in names if name not in self.lies}
        return {
            "issuer": self.lies.get("issuer", self.issuer),
            "jwks_uri": f"{self.issuer}/keys",
            "id_token_signing_alg_values_supported": ["RS256", "HS256", "none"],
            **known,
        }

    def _authorize(self, query: dict[str, str]) -> str:
        assert query["client_id"] == CLIENT
        assert (query["response_type"], query["code_challenge_method"]) == ("code", "S256")
        if "error" in self.lies:
            back = {"error": self.lies["error"], "state": query["state"]}
            return f"{query['redirect_uri']}?{urlencode(back)}"
        code = secrets.token_urlsafe()
        self.codes[code] = query
        return f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def token(self, form: dict[str, str], headers: Mapping[str, str]) -> dict[str, Any]:
        """Answer a client that has a code."""
        given = b64decode(headers["authorization"].removeprefix("Basic ")).decode()
        name, _, secret = given.partition(":")
        plain = given == f"{CLIENT}:{self.secret}"
        assert plain or (unquote(name), unquote(secret)) == (CLIENT, self.secret)
        asked = self.codes.pop(form["code"])
        assert form["redirect_uri"] == asked["redirect_uri"]
        proof = urlsafe_b64encode(sha256(form["code_verifier"].encode()).digest()).decode()
        assert proof.rstrip("=") == asked["code_challenge"]
        access = secrets.token_urlsafe()
        self.tokens.add(access)
        answer = {"access_token": access, "token_type": "Bearer", "expires_in": 3600}
        return answer if "no id_token" in self.lies else {**answer, "id_token": self._signed(asked)}

    def _signed(self, asked: dict[str, str]) -> str:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 60}
        claims |= {"nonce": asked["nonce"], **self.user, **self.lies.get("claims", {})}
        if "alg" in self.lies:
            return self._unsigned(self.lies["alg"], claims)
        return jwt.encode({"alg": "RS256", "kid": "one"}, claims, self.lies.get("key", self.key))

    def _unsigned(self, alg: str, claims: dict[str, Any]) -> str:
        """Return a token that takes no secret: without a signature, or by the public key."""
        header = {"alg": alg, "kid": "one"}
        text = ".".join(_encoded(json.dumps(one).encode()) for one in (header, claims))
        by = hmac.digest(self.key.as_pem(private=False), text.encode(), "sha256")
        return f"{text}.{_encoded(by) if alg == 'HS256' else ''}"


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


@contextmanager
def provider() -> Iterator[OidcSimulator]:
    """A running simulator."""
    state = OidcSimulator()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            state.asked.append(parts.path)
            found = state.get(parts.path, dict(parse_qsl(parts.query)), _lower(self.headers))
            self._answer(found)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            self._answer(state.token(dict(parse_qsl(body)), _lower(self.headers)))

        def _answer(self, found: Any) -> None:
            self.send_response(302 if isinstance(found, str) else state.lies.get("status", 200))
            self.send_header("content-type", "application/json")
            if isinstance(found, str):
                self.send_header("location", found)
            body = json.dumps(found).encode()
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            del args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.issuer = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
