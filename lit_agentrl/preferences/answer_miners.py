"""Miners that compare whole answers: by their score, with and without knowledge, and with a fact turned false."""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lit_agentrl.errors import UserError
from lit_agentrl.preferences.answers import Answer, Question, asked, best_and_worst, pair
from lit_agentrl.preferences.candidates import Candidate
from lit_agentrl.preferences.judge import AnswerJudge, edge_records
from lit_agentrl.preferences.rollout_miners import check_count, check_group
from lit_agentrl.preferences.source import Miner, MiningSource
from lit_agentrl.rollouts.base import Prompt
from lit_agentrl.types import Environment, Observation, TrajectoryGroup, WalkthroughSuite

log = logging.getLogger(__name__)


class BestOfK(Miner):
    """The best of `data.group_size` answers against the worst ones.

    Args:
        by: The score: `knowledge` is S(y), by the graph; `reward` is what the episode earned.
        graph: A knowledge graph's file; None for the built-in notes.
        top: Facts that a question asks for.
        hops: How far around the disease they are looked for.
        pairs_per_prompt: At most so many.
    """

    mode = "best_of_k_by_score"

    def __init__(
        self,
        by: Literal["knowledge", "reward"] = "knowledge",
        graph: str | None = None,
        top: int = 8,
        hops: int = 1,
        pairs_per_prompt: int = 1,
    ) -> None:
        check_count("pairs_per_prompt", pairs_per_prompt)
        if by not in ("knowledge", "reward"):
            raise UserError(f"by={by!r} is unknown; allowed are knowledge and reward.")
        if by == "reward" and graph is not None:
            raise UserError(f"graph={graph!r} is not used by rewards: set by to knowledge, or leave the graph out.")
        self.judge = AnswerJudge(graph, top, hops) if by == "knowledge" else None
        self.pairs_per_prompt = pairs_per_prompt

    def check(self, source: MiningSource) -> None:
        """A prompt needs two answers, and the graph its disease."""
        check_group(source)
        if self.judge is not None:
            self.judge.check(source)

    def origin(self) -> dict[str, Any]:
        """The graph."""
        return {} if self.judge is None else {"knowledge": dict(self.judge.origin())}

    def mine(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        """The best of each prompt's answers against the worst."""
        return [self._pairs(group, source) for group in source.play(prompts)]

    def _pairs(self, group: TrajectoryGroup, source: MiningSource) -> list[Candidate]:
        question = asked_once(group)
        if question is None:
            return []
        if self.judge is None:
            return best_and_worst(question, _rewarded(group), self.mode, self.pairs_per_prompt)
        disease = self.judge.disease(source, group.prompt_id)
        if not disease:
            return []
        text = question.prompt[-1]["content"]
        answers = self.judge.answers(group, disease, text)
        found = best_and_worst(question, answers, self.mode, self.pairs_per_prompt)
        for candidate in found:
            candidate.provenance["edges"] = edge_records(self.judge.scorer.retrieved(disease, text))
        return found


class RagVsPlain(Miner):
    """Answers that were given with what a graph knows in the prompt, against the policy's own.

    The prompt that is stored is the plain one: what was looked up has to be learnt by heart. This is the likely reading
    of DermIQ-VLM's preference stage (arXiv 2510.01236); how its pairs were made is not public.

    Args:
        graph: A knowledge graph's file; None for the built-in notes.
        top: Facts in a prompt at most.
        hops: How far around the disease they are looked for.
        num_grounded: Answers with knowledge; the best is chosen.
        num_plain: Answers without; the worst is rejected.
    """

    mode = "rag_vs_plain"

    def __init__(
        self, graph: str | None = None, top: int = 8, hops: int = 1, num_grounded: int = 1, num_plain: int = 1
    ) -> None:
        check_count("num_grounded", num_grounded)
        check_count("num_plain", num_plain)
        self.judge = AnswerJudge(graph, top, hops)
        self.num_grounded, self.num_plain = num_grounded, num_plain

    def check(self, source: MiningSource) -> None:
        """The graph must know every disease."""
        self.judge.check(source)

    def origin(self) -> dict[str, Any]:
        """The graph."""
        return {"knowledge": dict(self.judge.origin())}

    def mine(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        """Both kinds of answers to every prompt, and the pair that they make."""
        plain = source.play(prompts, self.num_plain)
        grounded = source.play(prompts, self.num_grounded, partial(self._informed, source))
        return [self._pairs(*groups, source) for groups in zip(plain, grounded, strict=True)]

    def _informed(self, source: MiningSource, task: str, environment: Environment) -> Environment:
        disease = self.judge.disease(source, task)
        return Informed(environment, self.judge, disease) if disease else environment

    def _pairs(self, plain: TrajectoryGroup, grounded: TrajectoryGroup, source: MiningSource) -> list[Candidate]:
        question, disease = asked_once(plain), self.judge.disease(source, plain.prompt_id)
        if question is None or not disease:
            return []
        if asked_once(grounded) is None:
            log.warning(
                "%s: the prompt with knowledge left no room for an answer: raise --data.max_length.", plain.prompt_id
            )
            return []
        text = question.prompt[-1]["content"]
        others = self.judge.answers(plain, disease, text)
        better = self.judge.answers(grounded, disease, text)
        chosen = min(better, key=lambda answer: (answer.is_correct is False, -answer.score))
        rejected = min(others, key=lambda answer: answer.score)
        edges = edge_records(self.judge.scorer.retrieved(disease, text))
        return [pair(question, chosen, rejected, self.mode, edges=edges)]


class CorruptFact(Miner):
    """A good answer against itself with one true fact turned into a false one: a hard negative.

    Args:
        graph: A knowledge graph's file; None for the built-in notes.
        answers: The good answer: the best of the policy's `data.group_size` ones, or the suite's `reference`.
        hops: How far around the disease facts are looked for.
        top: Facts that a question asks for.
    """

    mode = "corrupt_fact"

    def __init__(
        self,
        graph: str | None = None,
        answers: Literal["policy", "reference"] = "policy",
        hops: int = 1,
        top: int = 8,
    ) -> None:
        if answers not in ("policy", "reference"):
            raise UserError(f"answers={answers!r} is unknown; allowed are policy and reference.")
        self.judge = AnswerJudge(graph, top, hops)
        self.answers = answers

    def check(self, source: MiningSource) -> None:
        """The graph must know every disease, and the suite the answers that are asked for."""
        self.judge.check(source)
        if self.answers == "reference" and not isinstance(source.environment, WalkthroughSuite):
            raise UserError(f"{type(source.environment).__name__} has no reference answers: set answers to policy.")

    def origin(self) -> dict[str, Any]:
        """The graph."""
        return {"knowledge": dict(self.judge.origin())}

    def mine(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        """Each prompt's answer and its corrupted twin."""
        if self.answers == "policy":
            groups = source.play(prompts)
            given = [self._best(group, source) for group in groups]
        else:
            given = [self._reference(prompt.task, source) for prompt in prompts]
        return [
            [] if found is None else self._pairs(*found, source, prompt.task)
            for prompt, found in zip(prompts, given, strict=True)
        ]

    def _best(self, group: TrajectoryGroup, source: MiningSource) -> tuple[Question, Answer] | None:
        question, disease = asked_once(group), self.judge.disease(source, group.prompt_id)
        if question is None or not disease:
            return None
        answers = self.judge.answers(group, disease, question.prompt[-1]["content"])
        return question, min(answers, key=lambda answer: (answer.is_correct is False, -answer.score))

    def _reference(self, task: str, source: MiningSource) -> tuple[Question, Answer] | None:
        assert isinstance(source.environment, WalkthroughSuite)
        disease = self.judge.disease(source, task)
        if not disease:
            return None
        (observation, reply), *more = source.environment.walkthrough(task)
        if more:
            raise several_turns(task)
        system = [{"role": "system", "content": observation.system}] if observation.system else []
        prompt = [*system, {"role": "user", "content": observation.text}]
        answer = self.judge.answer(reply, disease, observation.text, source="reference")
        return Question(task, prompt, observation.images), answer

    def _pairs(self, question: Question, good: Answer, source: MiningSource, task: str) -> list[Candidate]:
        from lit_agentrl.knowledge import corrupt_fact

        disease, said = self.judge.disease(source, task), self.judge.said(good.text)
        rng = random.Random(f"{source.seed} {task}")
        scorer = self.judge.scorer
        corruption = corrupt_fact(said, scorer.graph, disease, rng, scorer) if said else None
        if corruption is None:
            return []
        before, _, after = good.text.rpartition(said)
        bad = self.judge.answer(
            before + corruption.text + after, disease, question.prompt[-1]["content"], corruption=corruption.record()
        )
        return [pair(question, good, bad, self.mode)]


class Informed:
    """An environment whose first question comes with what a graph knows of the disease.

    Args:
        environment: What is played.
        judge: Whose graph.
        disease: What the task is about.
    """

    def __init__(self, environment: Environment, judge: AnswerJudge, disease: str) -> None:
        self._environment, self._judge, self._disease = environment, judge, disease

    def reset(self) -> Observation:
        """The question, with the facts and the disease's name before it."""
        from lit_agentrl.knowledge import kg_prompt

        first = self._environment.reset()
        edges = self._judge.scorer.retrieved(self._disease, first.text)
        return replace(first, text=kg_prompt(edges, first.text, self._disease))

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The environment's."""
        return self._environment.step(action)

    @property
    def anchor(self) -> Hashable:
        """The environment's."""
        return self._environment.anchor

    @property
    def success(self) -> bool | None:
        """The environment's."""
        return self._environment.success

    @property
    def metrics(self) -> Mapping[str, float]:
        """The environment's, where it has some."""
        found: Mapping[str, float] = getattr(self._environment, "metrics", {})
        return found

    def close(self) -> None:
        """Free what it holds."""
        self._environment.close()


def asked_once(group: TrajectoryGroup) -> Question | None:
    """What a group was asked; None where no episode got to an answer.

    Raises:
        UserError: Its episodes have several turns.
    """
    question = asked(group)
    if question is None and any(len(t.steps) > 1 for t in group.trajectories):
        raise several_turns(group.prompt_id)
    return question


def several_turns(task: str) -> UserError:
    """The error for an episode that is no single answer."""
    return UserError(
        f"{task!r} takes several turns, and this miner compares single answers: use TreeSiblings or AnchorActions, or "
        "set the rollout's max_steps to 1."
    )


def _rewarded(group: TrajectoryGroup) -> list[Answer]:
    """The group's answers by what their episodes earned."""
    return [
        Answer(t.steps[0].action, t.total_reward, t.success, {"trajectory": i, "rewards": dict(t.rewards)})
        for i, t in enumerate(group.trajectories)
        if t.steps and not t.stop_reason.is_failure
    ]
