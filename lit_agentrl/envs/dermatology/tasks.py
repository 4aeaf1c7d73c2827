"""From samples to tasks: `train-...`, `val-...`, `test-...`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from lit_agentrl.envs.dermatology.samples import ImageSource, Sample
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split


class SampleTasks:
    """The samples of a source by task id: the split, and the sample's id.

    Args:
        source: Where the samples come from.
        expand: The tasks of a sample, by what follows the split in their ids; by default one, of its id.
    """

    def __init__(
        self, source: ImageSource, expand: Callable[[Sample], Sequence[tuple[str, Sample]]] | None = None
    ) -> None:
        self._source, self._expand = source, expand or _itself
        self._found: dict[Split, Mapping[str, Sample]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the samples: the source gives them again."""
        return vars(self) | {"_found": {}}

    @property
    def labels(self) -> Sequence[str]:
        """The source's."""
        return self._source.labels

    def ids(self, split: Split) -> Sequence[str]:
        """The split's tasks, in the source's order.

        Raises:
            UserError: There is no such split, or two tasks of it have one id.
        """
        return list(self._table(split))

    def has(self, task: str) -> bool:
        """Whether it is one of these."""
        split = _split_of(task)
        return split is not None and task in self._table(split)

    def sample(self, task: str) -> Sample:
        """What the task is about.

        Raises:
            UserError: There is no such task.
        """
        split = _split_of(task)
        if split is not None and (found := self._table(split).get(task)):
            return found
        example = next((id for split in SPLITS for id in self._table(split)), "train-...")
        raise UserError(f"task={task!r} is not a task of this suite; a task looks like {example!r}.")

    def _table(self, split: Split) -> Mapping[str, Sample]:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; allowed are {', '.join(SPLITS)}.")
        if split not in self._found:
            tasks = [task for sample in self._source.samples(split) for task in self._expand(sample)]
            table = {f"{split}-{id}": sample for id, sample in tasks}
            if len(table) < len(tasks):
                raise UserError(
                    f"The {split} split of {type(self._source).__name__} has {len(tasks)} samples, but only "
                    f"{len(table)} ids: every sample needs its own."
                )
            self._found[split] = table
        return self._found[split]


def check_tag(name: str, tag: str) -> None:
    """Refuse a tag that could not be told from the text around it.

    Raises:
        UserError: It is not made of letters, digits, `_` and `-`.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", tag):
        raise UserError(f"{name}={tag!r} must be a word of letters, digits, _ and -, without brackets: think.")


def _itself(sample: Sample) -> Sequence[tuple[str, Sample]]:
    return [(sample.id, sample)]


def _split_of(task: str) -> Split | None:
    return next((split for split in SPLITS if task.startswith(f"{split}-")), None)
