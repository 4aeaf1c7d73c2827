"""`VLLMServer`: rollouts by one or more vLLM servers, which may run on other machines."""

from __future__ import annotations

import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from lit_agentrl import distributed
from lit_agentrl.errors import UserError
from lit_agentrl.models.fingerprint import distance
from lit_agentrl.rollouts.vllm.base import SyncedEngine
from lit_agentrl.rollouts.vllm.endpoint import HOW_TO_START, Endpoint
from lit_agentrl.rollouts.vllm.errors import EngineError
from lit_agentrl.rollouts.vllm.handed import SAME_WEIGHTS, Adapter, WholeModel
from lit_agentrl.rollouts.vllm.http import CallError
from lit_agentrl.rollouts.vllm.in_process import as_fingerprint
from lit_agentrl.rollouts.vllm.weights import Sync, agree, lora_rank, lora_scales

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_agentrl.rollouts.vllm.answers import Answer, Request, Rules
    from lit_agentrl.rollouts.vllm.weights import LanguageModel
    from lit_agentrl.types import Fingerprint, SamplingParams

MAX_IN_A_ROW = 3
"""Failed calls after which an endpoint is left out, where there is another."""
log = logging.getLogger(__name__)


class VLLMServer(SyncedEngine):
    """Asks OpenAI-compatible vLLM servers for tokens, and hands them the policy's weights.

    A call that fails is tried again, elsewhere where it can be. An endpoint that cannot be reached, hangs, fails three
    times in a row or turns out to have other weights than it was given is left out until the next sync; the log says
    so, and `num_failures` counts. Start servers with `lit-agentrl serve-vllm MODEL`.

    Args:
        urls: The servers, such as "http://127.0.0.1:8000". The contexts of a call are spread over them in blocks.
        sync: `full` hands the whole model over, an adapter merged; `adapter` the LoRA adapter alone, whose base the
            servers then have to be started with.
        folder: Where weights are written: a folder that all ranks and all servers see. By default memory, which is
            right for servers on this machine.
        timeout: Seconds that one request may take, its waiting in the server's queue included.
        sync_timeout: Seconds that a server may take to load the weights.
        retries: Tries of a request after the first.
        backoff: Seconds before the first retry; they double with each.
        max_concurrency: Requests to one server at a time.
        stop_token_ids: Tokens that end an action; by default the model's own end tokens.
        seed: Randomness of calls without `seeds`.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        urls: Sequence[str] = ("http://127.0.0.1:8000",),
        sync: Sync = "full",
        folder: str | None = None,
        timeout: float = 300.0,
        sync_timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_concurrency: int = 256,
        stop_token_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(sync, folder, stop_token_ids, seed)
        if isinstance(urls, str) or not urls or len(set(urls)) < len(urls):
            raise UserError(f"VLLMServer: urls={urls!r} must be a list of one or more addresses, each once.")
        if timeout <= 0 or sync_timeout <= 0 or retries < 0 or backoff < 0 or max_concurrency < 1:
            raise UserError(
                f"VLLMServer: timeout={timeout}, sync_timeout={sync_timeout}, retries={retries}, backoff={backoff}, "
                f"max_concurrency={max_concurrency} is out of range: times and max_concurrency are positive, retries "
                "and backoff 0 or more."
            )
        self.endpoints = [Endpoint(url, timeout) for url in urls]
        self.sync_timeout, self.retries, self.backoff = sync_timeout, retries, backoff
        self.max_concurrency = max_concurrency
        self._run = ""
        self._handed: WholeModel | Adapter | None = None
        self._dtype: torch.dtype | None = None

    @property
    def num_failures(self) -> int:
        """Calls without a usable answer so far, over all endpoints."""
        return sum(endpoint.num_failures for endpoint in self.endpoints)

    @property
    def asked(self) -> list[Endpoint]:
        """The endpoints that are not left out."""
        return [endpoint for endpoint in self.endpoints if not endpoint.left_out]

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What the servers hold the weights in; None before the first sync."""
        return self._dtype

    def _take_over(self, lm: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
        """Hand the weights to every server, from the first rank; the others take over who has them."""
        error: BaseException | None = None
        if not self._run:
            self._run = distributed.gather(secrets.token_hex(4))[0]  # no two runs call their versions alike
        version = f"{self._run}.{self.version + 1}"
        is_adapter = self.sync_mode == "adapter"
        handed = Adapter(version, folder, lora_rank(lm), lora_scales(lm)) if is_adapter else WholeModel(version, folder)
        if distributed.world()[0] == 0:
            with ThreadPoolExecutor(len(self.endpoints)) as pool:
                list(pool.map(lambda endpoint: self._hand_over(endpoint, handed), self.endpoints))
            if not self.asked:
                error = EngineError(
                    f"VLLMServer: no server took the weights of sync {self.version + 1}. {self._reasons()}"
                )
        agree(error, "VLLMServer")
        states = distributed.gather([(each.left_out, each.model, each.dtype) for each in self.endpoints])[0]
        for endpoint, (left_out, model, held_in) in zip(self.endpoints, states, strict=True):
            endpoint.readmit()
            endpoint.left_out, endpoint.model, endpoint.dtype = left_out, model, held_in
        self._dtype = getattr(torch, self.asked[0].dtype, None)
        self._handed = handed

    def _hand_over(self, endpoint: Endpoint, handed: WholeModel | Adapter) -> None:
        """Give one server the weights; one that does not take them is left out."""
        try:
            self._check_server(endpoint)
            handed.give(endpoint, self.sync_timeout)
            endpoint.readmit()
        except (CallError, EngineError) as failure:
            endpoint.fail(str(failure))
            self._leave_out(endpoint, f"did not take the weights: {failure}")

    def _check_server(self, endpoint: Endpoint) -> None:
        """Refuse a server whose log-probabilities would mean something else."""
        state = endpoint.call_workers("lit_state")
        mode, endpoint.dtype = state.get("logprobs_mode"), str(state.get("dtype"))
        endpoint.lora_rank = int(state.get("lora_rank", 0))
        if mode != "processed_logprobs":
            raise CallError(f"it gives {mode}, not processed_logprobs (those at the temperature). {HOW_TO_START}")

    def _ask(self, requests: Sequence[Request], params: SamplingParams, rules: Rules) -> list[Answer]:
        answers: dict[int, Answer] = {}
        while missing := [i for i in range(len(requests)) if i not in answers]:
            fresh = self._ask_all(missing, requests, params, rules)
            trusted = {endpoint for endpoint in {by for by, _ in fresh.values()} if self._has_weights(endpoint)}
            answers |= {i: answer for i, (endpoint, answer) in fresh.items() if endpoint in trusted}
        return [answers[i] for i in range(len(requests))]

    def _ask_all(
        self, indices: list[int], requests: Sequence[Request], params: SamplingParams, rules: Rules
    ) -> dict[int, tuple[Endpoint, Answer]]:
        """Answers to some requests and who gave them; neighbours go to the same server, which has their prefixes."""
        asked = self.asked
        if not asked:
            raise EngineError(f"VLLMServer: no server is left to ask. {self._reasons()}")
        homes = [asked[place * len(asked) // len(indices)] for place in range(len(indices))]
        pool = ThreadPoolExecutor(min(len(indices), self.max_concurrency * len(asked)), "vllm-request")
        try:
            futures = [
                pool.submit(self._ask_one, home, requests[i], params, rules)
                for home, i in zip(homes, indices, strict=True)
            ]
            return {i: future.result() for i, future in zip(indices, futures, strict=True)}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the others' deadlines

    def _ask_one(
        self, home: Endpoint, request: Request, params: SamplingParams, rules: Rules
    ) -> tuple[Endpoint, Answer]:
        """An answer after as many tries as are allowed, first from `home`, then from whoever is left."""
        endpoint, reasons = home, []
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            endpoint = self._next(endpoint, request.seed, is_retry=attempt > 0)
            try:
                answer = endpoint.complete(request, params, rules)
            except CallError as error:
                reasons.append(f"{endpoint}: {error}")
                self._note(endpoint, error)
                if error.is_final:
                    break
            else:
                endpoint.succeed()
                return endpoint, answer
        raise EngineError(
            f"VLLMServer: a request failed after {len(reasons)} tries. {'; '.join(dict.fromkeys(reasons))}. Look at "
            "the servers' own logs; the run can be resumed from its last checkpoint."
        )

    def _next(self, last: Endpoint, seed: int, *, is_retry: bool) -> Endpoint:
        """Who to ask: the same as before, but after a failure somebody else where there is one."""
        asked = self.asked or [last]  # the last one that there was is asked for as long as there are tries
        others = [endpoint for endpoint in asked if endpoint is not last]
        return others[seed % len(others)] if others and (is_retry or last not in asked) else last

    def _note(self, endpoint: Endpoint, error: CallError) -> None:
        endpoint.fail(str(error))
        has_others = any(other is not endpoint for other in self.asked)
        if has_others and not endpoint.left_out and (error.is_down or endpoint.num_in_a_row >= MAX_IN_A_ROW):
            self._leave_out(endpoint, str(error))

    def _has_weights(self, endpoint: Endpoint) -> bool:
        """Whether a server has the weights that it was given; one that has not is left out."""
        assert self._handed is not None
        try:
            self._handed.check(endpoint)
        except (EngineError, CallError) as error:
            endpoint.fail(str(error))
            self._leave_out(endpoint, str(error))
            return False
        return True

    def _leave_out(self, endpoint: Endpoint, reason: str) -> None:
        endpoint.left_out = reason
        log.warning("%s is left out until the next sync: %s.", endpoint, reason)

    def _reasons(self) -> str:
        return " ".join(f"{endpoint}: {endpoint.left_out or endpoint.last_failure}." for endpoint in self.endpoints)

    def fingerprint(self) -> Fingerprint | None:
        """Of the weights in the servers' memory, which have to be the same; None where they cannot tell.

        Raises:
            EngineError: Servers have different weights, or do not answer.
        """
        if not isinstance(self._handed, WholeModel):
            return None
        try:
            found = {str(endpoint): endpoint.ask_workers("lit_fingerprint") for endpoint in self.asked}
        except CallError as error:
            raise EngineError(f"VLLMServer: a server does not say what weights it has: {error}.") from error
        fingerprints = [as_fingerprint(parts) for parts in found.values()]
        known = [each for each in fingerprints if each is not None]
        if any(distance(known[0], each) > SAME_WEIGHTS for each in known):
            raise EngineError(f"VLLMServer: the servers have different weights: {found}.")
        return known[0] if len(known) == len(fingerprints) else None

    @property
    def longest_seconds(self) -> float:
        """The longest that a request may take before the run ends with an error, once it is sent."""
        timeout = self.endpoints[0].timeout
        return (self.retries + 1) * timeout + self.backoff * float(2**self.retries - 1)

    def close(self) -> None:
        """Remove the weights' files; the servers go on."""
        self.weights.remove()
