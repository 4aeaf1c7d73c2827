"""Episodes that a policy solved in an earlier stage, as examples to train on (rejection sampling)."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, EnvironmentSuite

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trace:
    """A solved episode: what was done."""

    task: str
    actions: tuple[str, ...]


class CorrectTraces(ConversationSource):
    """Solved episodes of a run's transcripts, played again.

    A transcript keeps texts: what the policy was shown comes from the environment, which carries the actions out anew,
    images included. So an episode counts only if it is still solved, and only if its task is of the train split. The
    newest episodes of a task come first.

    Args:
        environment: The suite that the run was trained in, with the same options.
        transcripts: The run's folder, its folder of transcripts, a file, or several of these.
        per_task: At most so many different episodes of a task.
        num_traces: At most so many in all, drawn with the seed; None for all.
        at_least: What an episode's own numbers must reach, such as `{format_ok: 1}`.
        seed: Of the choice.

    Raises:
        UserError: A number is out of range, or there are no transcripts.
    """

    def __init__(
        self,
        environment: EnvironmentSuite,
        transcripts: str | list[str],
        per_task: int = 1,
        num_traces: int | None = None,
        at_least: dict[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if per_task < 1 or (num_traces is not None and num_traces < 1):
            raise UserError(f"per_task={per_task}, num_traces={num_traces} must be at least 1 (num_traces: or null).")
        self.environment, self.per_task, self.num_traces = environment, per_task, num_traces
        self.at_least, self.seed = dict(at_least or {}), seed
        given = [transcripts] if isinstance(transcripts, str) else transcripts
        self.files = [file for path in given for file in transcript_files(Path(path).expanduser())]

    def conversations(self) -> Iterable[Conversation]:
        """The chosen episodes, each as what was shown and what was answered.

        Raises:
            UserError: No episode is left.
        """
        left_out: Counter[str] = Counter()
        traces = self._chosen(left_out)
        played = [conversation for trace in traces if (conversation := self._play(trace, left_out))]
        counts = ", ".join(f"{count} {why}" for why, count in left_out.items())
        if not played:
            raise UserError(
                f"No solved episode in {len(self.files)} transcript files ({self.files[0]} ...) can be used: {counts}."
            )
        log.info("correct traces: %d of %d tasks; left out: %s", len(played), len({t.task for t in traces}), counts)
        return played

    def _chosen(self, left_out: Counter[str]) -> list[Trace]:
        train = set(self.environment.tasks("train"))
        found: dict[str, list[Trace]] = defaultdict(list)
        for record in _records(self.files, left_out):
            why = self._why_not(record, train)
            if not why:
                task = str(record["prompt_id"])
                trace = Trace(task, tuple(str(step["action"]) for step in record["steps"]))  # type: ignore[attr-defined]
                if trace in found[task]:
                    why = "said before"
                elif len(found[task]) == self.per_task:
                    why = "beyond per_task"
                else:
                    found[task].append(trace)
            if why:
                left_out[why] += 1
        traces = [trace for task in sorted(found) for trace in found[task]]
        if self.num_traces is None or self.num_traces >= len(traces):
            return traces
        left_out["beyond num_traces"] += len(traces) - self.num_traces
        order = np.random.default_rng(self.seed).permutation(len(traces))[: self.num_traces]
        return [traces[place] for place in sorted(order)]

    def _why_not(self, record: Mapping[str, object], train: set[str]) -> str:
        """Why an episode is no example; empty where it is one."""
        if record.get("success") is not True:
            return "not solved"
        if record.get("stop_reason") != "done":
            return "cut"
        if record.get("prompt_id") not in train:
            return "not of the train split"
        metrics = record.get("metrics")
        own = metrics if isinstance(metrics, dict) else {}
        if any(not (own.get(name) or 0.0) >= least for name, least in self.at_least.items()):
            return f"below {self.at_least}"
        return ""

    def _play(self, trace: Trace, left_out: Counter[str]) -> Conversation | None:
        """The episode again; None where it does not end as it did."""
        environment = self.environment.make(trace.task)
        try:
            observation, done, turns = environment.reset(), False, []
            for action in trace.actions:
                if done:
                    break
                turns.append((observation, action))
                observation, _, done = environment.step(action)
            is_same = done and len(turns) == len(trace.actions) and environment.success is True
        finally:
            environment.close()
        if not is_same:
            left_out["no longer solved when played again: are the environment's options those of the run?"] += 1
        return turns if is_same else None


def transcript_files(path: Path) -> list[Path]:
    """The files of training episodes of a run, of a folder of transcripts, or the file itself; the newest first.

    Raises:
        UserError: There are none.
    """
    if path.is_file():
        return [path]
    folder = path / "transcripts" if (path / "transcripts").is_dir() else path
    files = sorted(folder.glob("iteration_*.jsonl"), reverse=True)
    if not files:
        raise UserError(
            f"{path} holds no transcripts of training (transcripts/iteration_*.jsonl). Give the folder of a run whose "
            "`transcripts` callback wrote them, or a file."
        )
    return files


def _records(files: Iterable[Path], left_out: Counter[str]) -> Iterator[Mapping[str, object]]:
    """The episodes of the files, in order; a line that is none is counted."""
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n"):  # not splitlines: a reply may hold U+2028
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("steps"), list):
                yield record
            elif line.strip():
                left_out["broken lines"] += 1
