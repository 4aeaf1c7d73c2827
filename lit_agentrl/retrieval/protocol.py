"""Search-R1's protocol over HTTP, as client and server speak it.

POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true} is answered with
{"result": [[{"document": {"id": "7", "contents": "..."}, "score": 12.3}, ...]]}, a list per query; without
`return_scores` each list holds the bare documents. What is not of this form is an error, never a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lit_agentrl.retrieval.base import Passage
from lit_agentrl.retrieval.corpus import passage

PATH = "/retrieve"


class ProtocolError(ValueError):
    """A request or an answer that is not of the protocol's form; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for."""

    queries: list[str]
    top_k: int
    return_scores: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on at a time."""

    num_queries: int = 1024
    top_k: int = 100


def encode_request(queries: Sequence[str], top_k: int) -> bytes:
    """The body of a request for these queries."""
    return json.dumps({"queries": list(queries), "topk": top_k, "return_scores": True}).encode()


def decode_request(body: bytes, default_top_k: int, limits: Limits) -> Request:
    """The request in a body.

    Raises:
        ProtocolError: There is none, or it asks for more than the limits allow.
    """
    item = _decoded(body)
    if not isinstance(item, dict) or "queries" not in item:
        raise ProtocolError('the body must be an object {"queries": [...], "topk": 3, "return_scores": true}')
    queries, top_k, scores = item["queries"], item.get("topk"), item.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ProtocolError("`queries` must be a list of texts")
    if len(queries) > limits.num_queries:
        raise ProtocolError(f"{len(queries)} queries are too many for one request: at most {limits.num_queries}")
    if top_k is None:
        top_k = default_top_k
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= limits.top_k:
        raise ProtocolError(f"`topk` must be a whole number from 1 to {limits.top_k}")
    if not isinstance(scores, bool):
        raise ProtocolError("`return_scores` must be true or false")
    return Request(queries, top_k, scores)


def encode_answer(found: Sequence[Sequence[Passage]], return_scores: bool) -> bytes:
    """The body of the answer that holds these passages."""
    documents = [[{"id": passage.id, "contents": passage.contents} for passage in passages] for passages in found]
    if not return_scores:
        return json.dumps({"result": documents}).encode()
    scored = [
        [{"document": document, "score": passage.score} for document, passage in zip(*pair, strict=True)]
        for pair in zip(documents, found, strict=True)
    ]
    return json.dumps({"result": scored}).encode()


def decode_answer(body: bytes, num_queries: int) -> list[list[Passage]]:
    """The passages per query in the body of an answer, with or without scores and ids.

    Raises:
        ProtocolError: The body holds no answer to `num_queries` queries.
    """
    item = _decoded(body)
    result = item.get("result") if isinstance(item, dict) else None
    if not isinstance(result, list):
        raise ProtocolError('no object with a list under "result"')
    if len(result) != num_queries:
        raise ProtocolError(f"{len(result)} results for {num_queries} queries")
    for passages in result:
        if not isinstance(passages, list):
            raise ProtocolError(f"a result must be a list of documents, not {type(passages).__name__}")
    return [[_passage(item) for item in passages] for passages in result]


def _passage(item: object) -> Passage:
    """A document, or a document with its score."""
    if not isinstance(item, dict):
        raise ProtocolError(f"a document must be an object, not {type(item).__name__}")
    score = None
    document = item
    if "document" in item:
        document, score = item["document"], item.get("score")
        if not isinstance(document, dict):
            raise ProtocolError(f"`document` must be an object, not {type(document).__name__}")
    if not isinstance(contents := document.get("contents"), str):
        raise ProtocolError("a document has no text under `contents`")
    id = document.get("id", "")
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ProtocolError(f"the id of a document must be text or a whole number, not {type(id).__name__}")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ProtocolError(f"a score must be a number, not {type(score).__name__}")
    if score is not None and not math.isfinite(score):
        raise ProtocolError(f"a score must be finite, not {score}")
    return passage(str(id), contents, None if score is None else float(score))


def _decoded(body: bytes) -> object:
    try:
        decoded: object = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no JSON ({error})") from error
    return decoded
