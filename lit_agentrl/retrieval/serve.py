"""`lit-agentrl serve-retriever`: one process that holds the index, and the model, for all who search."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lit_agentrl.errors import UserError
from lit_agentrl.retrieval.bm25 import BM25Retriever
from lit_agentrl.retrieval.dense import DenseRetriever
from lit_agentrl.retrieval.protocol import Limits
from lit_agentrl.retrieval.server import RetrievalServer


def main(options: list[str]) -> None:
    """`lit-agentrl serve-retriever --corpus FILE [--kind bm25|dense ...]`.

    Raises:
        SystemExit: With 130 after Ctrl-C; SIGTERM, the order to end, is an ordinary end.
    """
    given = _parser().parse_args(options)
    _check(given)
    if given.kind == "dense":
        prefixes = {"query_prefix": given.query_prefix, "passage_prefix": given.passage_prefix}
        retriever: BM25Retriever | DenseRetriever = DenseRetriever(
            given.corpus, given.model, given.index, faiss_index=given.faiss_index, device=given.device, **prefixes
        )
    else:
        retriever = BM25Retriever(given.corpus, given.index)
    with _port_errors(given):  # before an index is built, which may take an hour
        server = RetrievalServer(retriever, given.host, given.port, given.top_k)
    if not _is_loopback(given.host):
        print(
            f"warning: {given.host} can be reached from other machines, and whoever reaches it may search.",
            file=sys.stderr,
        )
    try:
        retriever.prepare()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    with server:
        with _port_errors(given):
            server.start()
        _serve_until_signal(f"{len(retriever)} passages of {given.corpus} ({given.kind}) at {server.url}")


def _serve_until_signal(what: str) -> None:
    """Say what is served, and come back when SIGTERM does."""
    came: list[int] = []
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        stopped.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    print(f"serving {what}", flush=True)
    stopped.wait()
    if came[0] == signal.SIGINT:
        raise SystemExit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lit-agentrl serve-retriever", description=__doc__)
    parser.add_argument("--corpus", required=True, help='a file with one {"id", "contents"} object a line')
    parser.add_argument("--kind", choices=("bm25", "dense"), default="bm25", help="words or vectors (default: bm25)")
    parser.add_argument("--index", help="the folder where indexes are kept (default: the project's cache)")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default: 8000)")
    parser.add_argument("--top_k", type=int, default=3, help="passages where a request does not say (default: 3)")
    dense = parser.add_argument_group("for --kind dense")
    dense.add_argument("--model", help="a folder with a sentence model, or its name on the hub")
    dense.add_argument("--query_prefix", default="", help='"query: " for E5')
    dense.add_argument("--passage_prefix", default="", help='"passage: " for E5')
    dense.add_argument("--faiss_index", help="a finished faiss file of the corpus, read instead of building one")
    dense.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    return parser


@contextmanager
def _port_errors(given: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{given.host}:{given.port} cannot be listened on ({error.strerror}). "
            "Give another --port; 0 is any free one."
        ) from error


def _check(given: argparse.Namespace) -> None:
    if not 0 <= given.port <= 65535:
        raise UserError(f"--port {given.port} is out of range: allowed are 0 (any free one) to 65535.")
    if not 1 <= given.top_k <= Limits().top_k:
        raise UserError(f"--top_k {given.top_k} is out of range: allowed are 1 to {Limits().top_k}.")
    if given.kind == "dense" and not given.model:
        raise UserError("--kind dense needs --model: a folder with a sentence model, or its name on the hub.")
    only_dense = ("model", "query_prefix", "passage_prefix", "faiss_index")
    if given.kind == "bm25" and (idle := [f"--{name}" for name in only_dense if getattr(given, name)]):
        raise UserError(f"{', '.join(idle)} would do nothing with --kind bm25: add --kind dense.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
