"""The part of OpenAI's chat completions that a policy of text can serve: what a program asks, and what it is told."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # the later name for the same
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# How to sample is the run's decision: trained tokens must come from the distribution that the ratio assumes.
NOT_HEEDED = (
    "frequency_penalty",
    "logit_bias",
    "max_completion_tokens",
    "max_tokens",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
)


class RefusedError(Exception):
    """A request that cannot be served.

    Args:
        status: Of HTTP.
        message: Why, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    text: str

    def agrees_with(self, other: ChatMessage) -> bool:
        """Whether they say the same; programs often trim what they quote."""
        return self.role == other.role and self.text.strip() == other.text.strip()


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One request for a completion."""

    messages: tuple[ChatMessage, ...]
    model: str
    streams: bool
    not_heeded: tuple[str, ...]
    """Options it set that change nothing."""

    def answer(self, text: str) -> tuple[str, bytes]:
        """The content type and the body that say `text`; a stream says it in one piece.

        There is no `usage`: tokens are the engine's to count.
        """
        message = {"role": "assistant", "content": text}
        kind, field = ("chat.completion.chunk", "delta") if self.streams else ("chat.completion", "message")
        completion = {
            "id": f"chatcmpl-{secrets.token_hex(8)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": [{"index": 0, field: message, "finish_reason": "stop"}],
        }
        body = json.dumps(completion)
        if self.streams:
            return "text/event-stream", f"data: {body}\n\ndata: [DONE]\n\n".encode()
        return "application/json", body.encode()


def read_call(body: bytes) -> ChatCall:
    """The request in an HTTP body.

    Raises:
        RefusedError: It is not a chat completion request, or asks for what a policy of text has not: tools, images,
            several answers, log-probabilities.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RefusedError(400, "the body must be a JSON object with `messages`")
    for name in ("tools", "functions"):
        if fields.get(name):
            raise RefusedError(
                400, f"`{name}`: the policy answers in text only. Describe tools in the prompt and read its answer"
            )
    if fields.get("n") not in (None, 1) or fields.get("logprobs"):
        raise RefusedError(400, "`n` and `logprobs`: one answer is given, as text")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "`messages` must be a list that is not empty")
    read = tuple(_read_message(message) for message in messages)
    if read[-1].role == "assistant":
        raise RefusedError(400, "the last message is the assistant's own: the policy begins its answers itself")
    not_heeded = tuple(name for name in NOT_HEEDED if fields.get(name) is not None)
    return ChatCall(read, str(fields.get("model") or "policy"), bool(fields.get("stream")), not_heeded)


def error_body(message: str) -> bytes:
    """An error as clients of the protocol expect it."""
    return json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()


def _read_message(message: object) -> ChatMessage:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        raise RefusedError(400, f"a message needs a `role` of {', '.join(_ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        raise RefusedError(400, "an assistant message with tool calls: the policy makes none")
    return ChatMessage(_ROLES[message["role"]], _read_content(message.get("content")))


def _read_content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RefusedError(400, "`content` must be a text or a list of text parts")
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise RefusedError(400, "`content` has parts that are not text: images, audio and files are not supported")
    return "".join(str(text) for text in texts)
