"""JSON over HTTP with a deadline that holds however slowly bytes trickle in."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lit_agentrl.deadline import hang_up_at
from lit_agentrl.errors import UserError

MAX_BYTES = 64 << 20
"""The largest answer that is read."""
_QUOTED = 300


class CallError(Exception):
    """A call without a usable answer.

    Args:
        reason: What came, to follow the name of the endpoint.
        is_down: Whether the endpoint cannot be reached, or hangs: others would only wait for it too.
        status: Of HTTP, where there was one.
    """

    def __init__(self, reason: str, *, is_down: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.is_down, self.status = is_down, status

    @property
    def is_final(self) -> bool:
        """Whether the request itself is refused, as every server would."""
        return self.status in (400, 413, 422)


@dataclass(frozen=True)
class Address:
    """Where an OpenAI-compatible server listens."""

    secure: bool
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read "http://127.0.0.1:8000"; a "/v1" at the end may be there or not.

        Raises:
            UserError: It is no such address.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = urlsplit(""), None, None
        is_plain = url.isascii() and url.isprintable() and " " not in url
        if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or parts.username:
            is_plain = False
        if not is_plain or host is None:
            raise UserError(f"urls: {url!r} is no address of a server; it should be like 'http://127.0.0.1:8000'.")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(secure, host, port or (443 if secure else 80), prefix)

    def __str__(self) -> str:
        """The address without the path of a call."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}"


def call(address: Address, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
    """What the JSON of an answer holds; None for an empty one. A body is posted, else it is a GET.

    Raises:
        CallError: No answer within `timeout` seconds, a status other than 200, or no JSON.
    """
    kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=timeout)
    end = time.monotonic() + timeout
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):  # no option: options are saved with the run
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.connect()
        with hang_up_at(end, connection):
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", address.prefix + path, data, headers)
            response = connection.getresponse()
            raw = response.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(error, end, timeout) from error
    finally:
        connection.close()
    if time.monotonic() >= end:  # hung up on, which looks like an end of the answer
        raise _no_answer(TimeoutError(), end, timeout)
    if response.status != 200:
        # a path or model that is not there, or no permission: waiting does not help
        is_down = response.status in (401, 403, 404)
        raise CallError(f"it answered {response.status} {_shortened(raw)}", is_down=is_down, status=response.status)
    if len(raw) > MAX_BYTES or response.length:
        raise CallError(f"its answer to {path} broke off, or is larger than {MAX_BYTES} bytes")
    try:
        return json.loads(raw) if raw.strip() else None
    except ValueError as error:
        raise CallError(f"its answer to {path} is no JSON: {_shortened(raw)}") from error


def _no_answer(error: Exception, end: float, timeout: float) -> CallError:
    if isinstance(error, TimeoutError) or time.monotonic() >= end:
        return CallError(f"it did not answer within {timeout:g} seconds", is_down=True)
    return CallError(f"no answer came ({str(error) or type(error).__name__})", is_down=True)


def _shortened(raw: bytes) -> str:
    text = " ".join(raw[: 4 * _QUOTED].decode(errors="replace").split())
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."
