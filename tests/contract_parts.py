"""Small runs of every method for the contract, ways to run its settings, and modules that break it on purpose."""

import copy
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_agentrl import distributed, lightning_cli
from lit_agentrl.advantages import spread, standardize, total_rewards
from lit_agentrl.cli import main
from lit_agentrl.doctor.contract.processes import CONFIG, Ended, Execute, command
from lit_agentrl.losses import aggregate
from lit_agentrl.methods import GRPOPlusPlusModule, SFTModule
from lit_agentrl.models.lm_parts import decoder_of
from lit_agentrl.types import Advantages, TrainBatch, TrajectoryGroup
from preference_parts import DPO, echo_pairs, write_pairs
from runs import ROOT

EXPERIMENTS = ROOT / "configs" / "experiment"
LORA = '{"r": 4, "alpha": 8}'


def words(method: str, lm: str, folder: Path, *more: str) -> list[str]:
    """`doctor --contract` on the tiny model, in float64, each method with another part of what there is."""
    given = ["--model.pretrained", lm, "--trainer.accelerator", "cpu", "--model.dtype", "float64"]
    if method == "grpo":  # every weight trained, far from its reference, with an entropy bonus
        chosen = ["--config", str(EXPERIMENTS / "grpopp_echo.yaml"), "--model.lora", "null"]
        chosen += ["--model.kl_coef", "0.1", "--model.reference.mode", "frozen", "--model.entropy_coef", "0.01"]
    elif method == "batch_std":  # advantages that all ranks have a part in
        chosen = ["--config", str(EXPERIMENTS / "grpopp_echo.yaml"), "--model.advantage", "batch_std"]
        chosen += ["--model.old_logprobs", "recompute", "--model.aggregation", "seq_mean_token_mean"]
    elif method == "echo":  # as it is shipped
        chosen = ["--config", str(EXPERIMENTS / "grpopp_echo.yaml")]
    elif method == "tree_grpo":  # shared steps that count a part in each row
        chosen = ["--config", str(EXPERIMENTS / "tree_grpo_echo.yaml"), "--model.credit", "mean"]
    elif method == "gigpo":
        chosen = ["--config", str(EXPERIMENTS / "gigpo_echo.yaml"), "--model.kl_coef", "0.1"]
        chosen += ["--model.reference.mode", "adapter_off"]
    elif method == "sft":
        chosen = ["--model", "SFTModule", "--model.lora", LORA, *supervised(folder)]
    elif method == "dpo":  # every weight trained, beside a frozen reference
        pairs = write_pairs(folder / "pairs.jsonl", echo_pairs())
        chosen = ["--config", DPO, "--model.lora", "null", "--data.path", str(pairs)]
    else:  # a module of this file
        chosen = ["--model", f"contract_parts.{method}", "--model.lora", LORA]
        chosen += supervised(folder) if issubclass(globals()[method], SFTModule) else rollouts()
    return ["doctor", *chosen, *given, "--contract", "true", *more]


def rollouts() -> list[str]:
    """The echo task's options without its module."""
    data = yaml.safe_load((EXPERIMENTS / "grpopp_echo.yaml").read_text())["data"]
    return ["--data", json.dumps(data)]


def supervised(folder: Path) -> list[str]:
    """Seven conversations, one or two answers each, of different lengths."""
    path = folder / "talks.jsonl"
    lines = []
    for i in range(7):
        turns = [{"role": "user", "content": f"Say {'x' * i}"}, {"role": "assistant", "content": f"yes {i}" * (i + 1)}]
        lines.append(json.dumps({"messages": turns * (1 + i % 2)}))
    path.write_text("\n".join(lines))
    source = {"class_path": "JSONLConversations", "init_args": {"path": str(path)}}
    data = {"class_path": "ConversationDataModule", "init_args": {"source": source, "max_length": 256}}
    return ["--data", json.dumps(data)]


class Stop(Exception):
    """Raised in the contract's place."""


def options_of(arguments: list[str], monkeypatch: Any) -> dict[str, Any]:
    """The options that the command line gives to the contract."""
    seen: dict[str, Any] = {}

    def check(options: dict[str, Any], num_prompts: int) -> None:
        seen.update(copy.deepcopy(options))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(lightning_cli, "check", check)
        try:
            main(arguments)
        except Stop:
            return seen
    raise AssertionError("the contract was not begun")


def in_this_process(*only: str) -> Execute:
    """Runs settings of these names here and now, by default all of one process: a strategy would leave its traces."""

    def execute(arguments: Sequence[str], timeout: float) -> Ended:
        output = io.StringIO()
        for folder in json.loads(arguments[-1]):
            strategy = yaml.safe_load((Path(folder) / CONFIG).read_text())["trainer"]["strategy"]
            name = Path(folder).name.replace("_", " ")
            if strategy != "auto" or (only and name not in (*only, "baseline")):
                return Ended(2, "error: not here")
            try:
                with redirect_stdout(output), redirect_stderr(output):
                    main(command([folder]))
            except SystemExit as end:
                return Ended(int(end.code or 0), output.getvalue())
        return Ended(0, output.getvalue())

    return execute


class LocalMean(SFTModule):
    """The mistake of most trainers: a mean over the tokens of a micro-batch."""

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        logp = self.score(batch).logprobs
        return aggregate(-logp, batch.action_mask, "token_mean", num_tokens=max(1, int(batch.action_mask.sum())))


class RankLoss(SFTModule):
    """The second rank weighs its rows a tenth more."""

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + 0.1 * distributed.world()[0])


class LocalAdvantage(GRPOPlusPlusModule):
    """Trajectories compared with all that this rank happens to hold."""

    def batch_advantages(self, groups: Sequence[TrajectoryGroup]) -> list[Advantages]:
        rewards = [total_rewards(group) for group in groups]
        values = standardize(torch.cat(rewards)).split([len(each) for each in rewards])
        return [spread(value, group) for value, group in zip(values, groups, strict=True)]


class Forgetful(SFTModule):
    """A layer that gives something else when its forward is run again for the backward pass."""

    def configure_model(self) -> None:
        fresh = self.policy is None
        super().configure_model()
        if fresh:
            decoder_of(self.policy.lm).layers[0].input_layernorm.register_forward_hook(_other_in_backward)


def _other_in_backward(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    is_backward = torch._C._current_graph_task_id() != -1
    return output * 1.1 if is_backward else output
