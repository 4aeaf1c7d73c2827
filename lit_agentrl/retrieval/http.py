"""A client of a search server that speaks Search-R1's protocol: `lit-agentrl serve-retriever`, or the original's."""

from __future__ import annotations

import http.client
import time
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

from lit_agentrl.deadline import hang_up_at
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval.base import Passage, RetrievalError, Retriever, shortened
from lit_agentrl.retrieval.cached import Accounts, PassageCache, SearchCounts
from lit_agentrl.retrieval.local import check_top_k
from lit_agentrl.retrieval.protocol import PATH, ProtocolError, decode_answer, encode_request


class HTTPRetriever(Retriever):
    """Asks a server. Threads may share it; a copy in another process has its own cache and counts.

    A try that fails to connect, breaks off, takes too long or is answered with a status of 500 and more is repeated. A
    status of 400 to 499 and an answer of the wrong form are not: they would come again. The longest a search can take
    is `longest_seconds`; keep it below the deadline of the environments (`data.step_deadline`).

    Args:
        url: The server, such as "http://127.0.0.1:8000"; "/retrieve" is added where it is missing.
        timeout: Seconds that one try may take, from connecting to the last byte.
        retries: Tries after the first.
        backoff: Seconds before the first retry; they double with each.
        cache_size: Answers that are kept in memory, by query and number of passages; 0 for none.
        max_bytes: The largest answer that is read.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 8.0,
        retries: int = 2,
        backoff: float = 0.5,
        cache_size: int = 4096,
        max_bytes: int = 16 << 20,
    ) -> None:
        self._secure, self._host, self._port, self._path = _parsed(url)
        if timeout <= 0 or retries < 0 or backoff < 0 or max_bytes < 1:
            raise UserError(
                f"timeout={timeout}, retries={retries}, backoff={backoff}, max_bytes={max_bytes} is out of range: "
                "timeout and max_bytes are positive, retries and backoff 0 or more."
            )
        self._timeout, self._retries, self._backoff, self._max_bytes = timeout, retries, backoff, max_bytes
        self._cache = PassageCache(cache_size)
        self._accounts = Accounts()
        self._has_answered = False

    @property
    def url(self) -> str:
        """Where requests go."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._secure else 'http'}://{host}:{self._port}{self._path}"

    @property
    def counts(self) -> SearchCounts:
        """What became of the searches so far, in this process."""
        return self._accounts.read()

    @property
    def longest_seconds(self) -> float:
        """The longest that a search may take before it fails."""
        return (self._retries + 1) * self._timeout + self._backoff * ((1 << self._retries) - 1)

    def prepare(self) -> None:
        """Ask once, so that a wrong address ends the run and does not fail every episode; a server may go later.

        Raises:
            UserError: There is no answer, or none of the protocol's form.
        """
        if self._has_answered:
            return
        try:
            self._ask(["hello"], 1)
        except RetrievalError as error:
            raise UserError(
                f"The search server does not answer: {error} Start it first (`lit-agentrl serve-retriever`), or "
                "correct the retriever's url."
            ) from error

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """The passages that the server finds, or found before; at most `top_k`, however many it sends."""
        check_top_k(top_k)
        return self._cache.search(queries, top_k, self._ask, self._accounts)

    def _ask(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """The server's answer, after as many tries as are allowed."""
        body = encode_request(queries, top_k)
        tries, reason = 0, ""
        while tries <= self._retries:
            if tries:
                time.sleep(self._backoff * 2 ** (tries - 1))
            self._accounts.add(requests=1, retries=int(tries > 0))
            tries += 1
            try:
                answers = decode_answer(self._post(body), len(queries))
                self._has_answered = True
                # Search-R1's server of web searches sends as many as it likes.
                return [passages[:top_k] for passages in answers]
            except ProtocolError as error:
                reason = f"the answer is malformed: {error}"
                break
            except _FailedTryError as error:
                reason = str(error)
                if not error.again:
                    break
        asked = shortened(queries[0]) + (f" and {len(queries) - 1} more" if len(queries) > 1 else "")
        times = "once" if tries == 1 else f"{tries} times"
        raise RetrievalError(f"the search for {asked} failed: {self.url} was asked {times}, and {reason}.")

    def _post(self, body: bytes) -> bytes:
        """The body of the answer to one request."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        end = time.monotonic() + self._timeout
        try:
            connection.connect()
            with hang_up_at(end, connection):
                connection.request("POST", self._path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = response.read(self._max_bytes + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _FailedTryError(self._reason(error, end), again=True) from error
        finally:
            connection.close()
        if time.monotonic() >= end:  # hung up on, which looks like an end of the answer
            raise _FailedTryError(self._reason(TimeoutError(), end), again=True)
        if response.status != HTTPStatus.OK:
            said = shortened(answer.decode(errors="replace"))
            raise _FailedTryError(f"it answered {response.status} {said}", again=response.status >= 500)
        if len(answer) > self._max_bytes:
            raise _FailedTryError(f"its answer is larger than max_bytes={self._max_bytes}", again=False)
        if response.length:  # a read of a given size does not complain
            raise _FailedTryError(f"its answer broke off {response.length} bytes before its end", again=True)
        return answer

    def _reason(self, error: Exception, end: float) -> str:
        """Why a try gave no answer."""
        if isinstance(error, TimeoutError) or time.monotonic() >= end:
            return f"it did not answer within {self._timeout:g} seconds"
        return f"no answer came ({str(error) or type(error).__name__})"


class _FailedTryError(Exception):
    """A try without an answer, and whether another may have one."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def _parsed(url: str) -> tuple[bool, str, int, str]:
    """Whether it is HTTPS, host, port and path."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as connecting will do
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if (
        not host
        or parts.scheme not in ("http", "https")
        or parts.query
        or parts.fragment
        or parts.username
        or not _is_plain(url)
    ):
        raise UserError(f"url={url!r} is no address of a search server; it should be like 'http://127.0.0.1:8000'.")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/")
    return secure, host, port or (443 if secure else 80), path if path.endswith(PATH) else path + PATH


def _is_plain(url: str) -> bool:
    """Whether a request line can hold it."""
    return url.isascii() and url.isprintable() and " " not in url
