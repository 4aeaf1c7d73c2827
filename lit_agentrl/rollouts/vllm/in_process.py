"""`VLLMEngine`: a vLLM that belongs to this process."""

from __future__ import annotations

import gc
import logging
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.rollouts.lm_limits import max_length
from lit_agentrl.rollouts.vllm.answers import Answer, MalformedAnswerError, has_nan
from lit_agentrl.rollouts.vllm.base import SyncedEngine
from lit_agentrl.rollouts.vllm.errors import EngineError
from lit_agentrl.rollouts.vllm.start import DType, Settings, start
from lit_agentrl.rollouts.vllm.weights import Sync, agree, base_of, lora_rank
from lit_agentrl.types import Fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from lit_agentrl.rollouts.vllm.answers import Request, Rules
    from lit_agentrl.rollouts.vllm.weights import LanguageModel
    from lit_agentrl.types import SamplingParams

T = TypeVar("T")
log = logging.getLogger(__name__)


class VLLMEngine(SyncedEngine):
    """vLLM beside the trainer on the same machine, one for every rank, started by the first `sync`.

    Token ids go in and out; prefixes are cached. The weights go by way of files in memory (`/dev/shm`), at every sync.

    Args:
        sync: `full` hands the whole model over, an adapter merged; `adapter` the LoRA adapter alone, which is less to
            write and, on CPU, several times slower to sample with.
        dtype: What vLLM computes in; `policy` is what the policy's weights are held in.
        max_length: Most tokens of a context and its action; by default the model's positions. It bounds the memory.
        memory: The share of a GPU's memory that vLLM may take, weights and caches together; the trainer has the rest.
        cpu_cache_gib: Memory for keys and values on machines without a GPU; `VLLM_CPU_KVCACHE_SPACE` wins.
        tensor_parallel: GPUs that share one model, where there is one rank.
        isolated: Run vLLM in processes of its own. In this one it starts faster, but takes over torch's process group
            and threads; only for one rank.
        timeout: Seconds that one call may take, however many contexts it has; only where isolated.
        folder: Where weights are written, a folder that all ranks see; by default memory.
        stop_token_ids: Tokens that end an action; by default the model's own end tokens.
        options: More arguments of `vllm.LLM`; they win.
        seed: Randomness of calls without `seeds`.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        sync: Sync = "full",
        dtype: DType = "policy",
        max_length: int | None = None,
        memory: float = 0.3,
        cpu_cache_gib: int = 1,
        tensor_parallel: int = 1,
        isolated: bool = True,
        timeout: float = 1800.0,
        folder: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
        options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(sync, folder, stop_token_ids, seed)
        self.settings = Settings(dtype, max_length, memory, cpu_cache_gib, tensor_parallel, isolated, options or {})
        self.settings.check()
        if timeout <= 0:
            raise UserError(f"VLLMEngine: timeout={timeout} must be a positive number of seconds.")
        self.timeout = timeout
        self._llm: Any = None
        self._adapter: Any = None
        self._dtype: torch.dtype | None = None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What vLLM holds the weights in; None before the first sync."""
        return self._dtype

    def _take_over(self, lm: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
        error: BaseException | None = None
        self._dtype = self._dtype or self.settings.torch_dtype(dtype)
        try:
            self._load(lm, folder)
        except UserError as failure:
            error = failure
        agree(error, "VLLMEngine")

    def _load(self, lm: LanguageModel, folder: Path) -> None:
        version = str(self.version + 1)
        assert self._dtype is not None
        if self._llm is None:
            is_adapter = self.sync_mode == "adapter"
            self._llm = start(
                base_of(lm) if is_adapter else folder,
                self.settings,
                self._dtype,
                positions=max_length(base_lm(lm)),
                lora_rank=lora_rank(lm) if is_adapter else None,
            )
            self._call_workers("lit_mark", version)
        elif self.sync_mode == "full":
            self._call_workers("lit_load", str(folder), version)
        if self.sync_mode == "adapter":
            from vllm.lora.request import LoRARequest

            # a number that vLLM has not seen: it would go on with what it loaded under a known one
            self._adapter = LoRARequest(f"lit-agentrl-{version}", self.version + 1, str(folder))
        if not self._timed(self._llm.reset_prefix_cache):
            raise EngineError("VLLMEngine: vLLM does not forget the keys and values of the old weights.")

    def _ask(self, requests: Sequence[Request], params: SamplingParams, rules: Rules) -> list[Answer]:
        import vllm

        if self._llm is None:
            raise UserError("VLLMEngine was closed: call sync(policy) before generate().")
        stop = [] if rules.stop_strings is None else list(rules.stop_strings.texts)
        sampling = [
            vllm.SamplingParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=request.seed,
                max_tokens=request.max_tokens,
                logprobs=0,  # the sampled token's alone
                ignore_eos=True,  # what ends an action is in stop_token_ids
                stop_token_ids=sorted(rules.stop_ids),
                stop=stop,
                include_stop_str_in_output=True,
                detokenize=bool(stop),
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.context} for request in requests]
        outputs = self._timed(lambda: self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=self._adapter))
        answers = [_answer(output) for output in outputs]
        for request, answer in zip(requests, answers, strict=True):
            if not has_nan(answer):
                try:
                    rules.check(request, answer)
                except MalformedAnswerError as error:
                    raise EngineError(f"VLLMEngine: vLLM gave a wrong answer: {error}.") from error
        return answers

    def fingerprint(self) -> Fingerprint | None:
        """Of the weights in vLLM's memory; None for an adapter, or weights packed or spread beyond reading."""
        if self._llm is None or self.sync_mode == "adapter":
            return None
        return as_fingerprint(self._call_workers("lit_fingerprint"))

    def close(self) -> None:
        """End vLLM and remove the weights' files. A later `sync` starts it anew."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._adapter = self._dtype = None
        self.weights.remove()
        gc.collect()

    def _call_workers(self, method: str, *args: str) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = self._timed(lambda: self._llm.collective_rpc(method, args=args))
        for result in results:
            if "error" in result:
                raise EngineError(f"VLLMEngine: vLLM's worker said to {method}: {result['error']}.")
        return results

    def _timed(self, call: Callable[[], T]) -> T:
        """What `call` gives, within the time limit: vLLM's own processes may hang or die."""
        if not self.settings.isolated:
            return call()
        results: list[T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(call())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="vllm-call", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if results:
            return results[0]
        if errors:
            self.close()  # most are of an engine that has died
            raise EngineError(
                f"VLLMEngine: vLLM failed ({type(errors[0]).__name__}: {errors[0]}). Its own lines above say more; "
                "the run can be resumed from its last checkpoint."
            ) from errors[0]
        self.close()
        raise EngineError(
            f"VLLMEngine: vLLM did not answer within timeout={self.timeout:g} seconds, and was ended. Raise `timeout` "
            "if that is how long a call may take; the run can be resumed from its last checkpoint."
        )


def as_fingerprint(parts: Sequence[dict[str, Any]]) -> Fingerprint | None:
    """What the workers' answers add up to; None where one cannot tell."""
    for part in parts:
        if "unknown" in part:
            log.info("vLLM gives no fingerprint of its weights: %s.", part["unknown"])
            return None
    count, total, squares = (sum(float(part[name]) for part in parts) for name in ("count", "total", "squares"))
    return Fingerprint(round(count), total, squares)


def _answer(output: Any) -> Answer:
    choice = output.outputs[0]
    tokens = list(choice.token_ids)
    logprobs = [float(candidates[token].logprob) for token, candidates in zip(tokens, choice.logprobs, strict=True)]
    return Answer(tokens, logprobs, str(choice.finish_reason), int(output.num_cached_tokens or 0))
