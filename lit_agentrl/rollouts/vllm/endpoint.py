"""One vLLM server: what it is asked, and whether it is to be trusted."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_agentrl.rollouts.vllm.answers import Answer, MalformedAnswerError
from lit_agentrl.rollouts.vllm.http import Address, CallError, call

if TYPE_CHECKING:
    from lit_agentrl.rollouts.vllm.answers import Request, Rules
    from lit_agentrl.types import SamplingParams

HOW_TO_START = (
    "Start it with `lit-agentrl serve-vllm MODEL`, or with VLLM_SERVER_DEV_MODE=1 and the options in docs/vllm.md"
)
HOW_TO_START_WITH_ADAPTERS = "Start it with `lit-agentrl serve-vllm MODEL --lora_rank RANK` (docs/vllm.md)"
_STATUS_SECONDS = 60.0
"""Long enough for a call that waits for the engine's current step."""


class Endpoint:
    """A server, and what became of the calls to it.

    Args:
        url: Its address.
        timeout: Seconds that one request for tokens may take.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.address = Address.parse(url)
        self.timeout = timeout
        self.model = ""
        """What it calls the model that requests are for."""
        self.dtype = ""
        """What it holds the weights in."""
        self.lora_rank = 0
        """The largest rank of an adapter that it has room for."""
        self.num_failures = 0
        """Calls without a usable answer, in the whole run."""
        self.num_in_a_row = 0
        """Those since its last usable answer."""
        self.left_out = ""
        """Why it is asked no more until the next sync; empty while it is asked."""
        self.last_failure = ""
        self._lock = threading.Lock()

    def __str__(self) -> str:
        """Its address."""
        return str(self.address)

    def fail(self, reason: str) -> None:
        """Note a call without a usable answer."""
        with self._lock:
            self.num_failures += 1
            self.num_in_a_row += 1
        self.last_failure = reason

    def succeed(self) -> None:
        """Note a usable answer."""
        with self._lock:
            self.num_in_a_row = 0

    def readmit(self) -> None:
        """Ask it again: it has just taken the weights."""
        self.left_out, self.num_in_a_row = "", 0

    def served_models(self) -> list[str]:
        """The model that it serves, by its own name for it, and its adapters.

        Raises:
            CallError: It does not say.
        """
        found = call(self.address, "/v1/models", None, _STATUS_SECONDS)
        try:
            names = [str(model["id"]) for model in found["data"]]
        except (TypeError, KeyError) as error:
            raise CallError(f"its list of models is malformed: {str(found)[:200]}") from error
        if not names:
            raise CallError("it serves no model")
        return names

    def call_workers(self, method: str, *args: str, timeout: float = _STATUS_SECONDS) -> dict[str, Any]:
        """What every worker answers to a method of `WorkerExtension`: they have to agree.

        Raises:
            CallError: They do not, or the server has no such method.
        """
        results = self.ask_workers(method, *args, timeout=timeout)
        if any(each != results[0] for each in results):
            raise CallError(f"its workers disagree about {method}: {str(results)[:200]}")
        return results[0]

    def ask_workers(self, method: str, *args: str, timeout: float = _STATUS_SECONDS) -> list[dict[str, Any]]:
        """What each worker answers to a method of `WorkerExtension`.

        Raises:
            CallError: The server has no such method, or a worker says what went wrong.
        """
        body = {"method": method, "args": list(args), "timeout": timeout}
        try:
            found = call(self.address, "/collective_rpc", body, timeout)
        except CallError as error:
            if error.status is None:
                raise
            raise CallError(f"{error}. {HOW_TO_START}", status=error.status) from error
        results = found.get("results") if isinstance(found, Mapping) else None
        if not isinstance(results, list) or not results or not all(isinstance(each, dict) for each in results):
            raise CallError(f"its workers answered {method} with {str(found)[:200]}. {HOW_TO_START}")
        for each in results:
            if "error" in each:
                raise CallError(f"its worker said: {each['error']}")
        return results

    def reset_prefix_cache(self, seconds: float) -> None:
        """Make it forget keys and values of the old weights.

        Raises:
            CallError: It does not within this time: requests that were given up still run.
        """
        end = time.monotonic() + seconds
        while True:
            found = call(self.address, "/reset_prefix_cache?reset_running_requests=true", {}, _STATUS_SECONDS)
            if not isinstance(found, Mapping) or found.get("success", True) is True:  # older servers say nothing
                return
            if time.monotonic() >= end:
                raise CallError("it does not forget keys and values of the old weights")
            time.sleep(0.2)

    def load_adapter(self, name: str, folder: str, timeout: float) -> None:
        """Take an adapter over, under a name that requests then ask for.

        Raises:
            CallError: It does not.
        """
        body = {"lora_name": name, "lora_path": folder}
        try:
            _call_for_text(self.address, "/v1/load_lora_adapter", body, timeout)
        except CallError as error:
            if error.status is None:
                raise
            how = "" if error.status != 404 else f". {HOW_TO_START_WITH_ADAPTERS}"
            raise CallError(f"{error}{how}", status=error.status) from error

    def unload_adapters(self, prefix: str) -> None:
        """Forget the adapters whose names begin so.

        Raises:
            CallError: It does not, or does not say which it has.
        """
        for name in self.served_models():
            if name.startswith(prefix):
                _call_for_text(self.address, "/v1/unload_lora_adapter", {"lora_name": name}, _STATUS_SECONDS)

    def complete(self, request: Request, params: SamplingParams, rules: Rules) -> Answer:
        """The answer to one request, checked.

        Raises:
            CallError: No answer, or one that cannot be to this request.
        """
        found = call(self.address, "/v1/completions", completion_body(self.model, request, params, rules), self.timeout)
        try:
            answer = read_completion(found, request, self.model)
            rules.check(request, answer)
        except MalformedAnswerError as error:
            raise CallError(f"its answer is wrong: {error}") from error
        return answer


def completion_body(model: str, request: Request, params: SamplingParams, rules: Rules) -> dict[str, Any]:
    """What `/v1/completions` is asked: tokens in, tokens out, and nothing left to the server's defaults."""
    return {
        "model": model,
        "prompt": request.context,
        "max_tokens": request.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "logprobs": 0,  # the sampled token's alone
        "return_token_ids": True,
        "ignore_eos": True,  # what ends an action is in stop_token_ids
        "stop_token_ids": sorted(rules.stop_ids),
        "stop": [] if rules.stop_strings is None else list(rules.stop_strings.texts),
        "include_stop_str_in_output": True,
        "add_special_tokens": False,
    }


def read_completion(found: Any, request: Request, model: str) -> Answer:
    """The one choice of an answer.

    Raises:
        MalformedAnswerError: It is not of the form that was asked for, to another prompt, or by another model.
    """
    try:
        (choice,) = found["choices"]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        finish, usage = str(choice["finish_reason"]), found.get("usage") or {}
        prompt, by = choice.get("prompt_token_ids", request.context), found.get("model", model)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise MalformedAnswerError(
            f"it is not of the form of a completion with token ids: {str(found)[:200]}"
        ) from error
    if prompt != request.context:
        raise MalformedAnswerError("it is to another prompt than was sent")
    if by != model:
        raise MalformedAnswerError(f"it is by {str(by)[:100]}, where {model} was asked for")
    if not _are(tokens, int) or not _are(logprobs, (int, float)) or not isinstance(cached, int):
        raise MalformedAnswerError("token ids or log-probabilities are no numbers")
    return Answer(tokens, [float(logprob) for logprob in logprobs], finish, cached)


def _are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _call_for_text(address: Address, path: str, body: Mapping[str, Any], timeout: float) -> None:
    """A call whose answer is a sentence."""
    try:
        call(address, path, body, timeout)
    except CallError as error:
        if error.status is not None or error.is_down or "is no JSON" not in str(error):
            raise
