"""Trees made by hand, and a model that trains on them in float64 throughout."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_agentrl.methods import TreeGRPOModule
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel, TokenScores
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rows import assemble, split_updates, to_rows
from lit_agentrl.types import Step, TrainBatch, Trajectory, TrajectoryGroup

VOCABULARY = 50
PROMPT = [1, 2, 3]


@dataclass
class Node:
    """A step of `size` action tokens, and what comes after it: more steps, or the reward of the leaf that it is."""

    size: int
    then: float | list[Node]


def forest(*trees: Node | list[Node], seed: int = 0, prompt: list[int] = PROMPT) -> TrajectoryGroup:
    """The leaves of all trees as one group; a list of nodes is a tree that branches at its root.

    Log-probabilities scatter around those of a random model, so that ratios lie on both sides of 1, many clipped.
    """
    rng = random.Random(seed)
    leaves = [
        leaf
        for tree_id, tree in enumerate(trees)
        for node in (tree if isinstance(tree, list) else [tree])
        for leaf in play(node, prompt, tree_id, (), rng)
    ]
    return TrajectoryGroup("prompt", leaves)


def play(
    node: Node, context: list[int], tree_id: int, path: tuple[Step, ...], rng: random.Random
) -> Iterator[Trajectory]:
    """The leaves below a node; its `Step` is one object in all of them."""
    action = [rng.randrange(4, VOCABULARY) for _ in range(node.size)]
    step = Step(context, action, [-3.9 + rng.uniform(-0.6, 0.6) for _ in action])
    if isinstance(node.then, float):
        yield Trajectory([*path, step], tree_id=tree_id, total_reward=node.then)
        return
    observation = [rng.randrange(4, VOCABULARY) for _ in range(2)]
    for child in node.then:
        yield from play(child, [*context, *action, *observation], tree_id, (*path, step), rng)


# Leaves of different lengths and depths, nodes shared by two, three and all leaves of their tree.
UNEVEN = Node(
    3, [Node(2, [Node(4, 1.0), Node(2, 0.0)]), Node(5, 0.0), Node(1, [Node(2, [Node(3, 1.0), Node(1, 0.0)])])]
)
BROAD = Node(2, [Node(3, 1.0), Node(1, 0.0), Node(2, 0.0), Node(4, 1.0), Node(2, 1.0)])
CHAINS = [Node(4, 1.0), Node(2, 0.0), Node(3, 0.0)]
DEEP = Node(1, [Node(1, [Node(1, [Node(1, [Node(2, 1.0), Node(3, 0.0)]), Node(4, 1.0)]), Node(2, 0.0)]), Node(5, 1.0)])
SHAPES: dict[str, Node | list[Node]] = {"uneven": UNEVEN, "broad": BROAD, "chains": CHAINS, "deep": DEEP}


def exact_lm(seed: int = 0) -> nn.Module:
    """A tiny random Llama in float64, its norms too: transformers' compute in float32 whatever the model's dtype."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.08,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(config).double().eval()
    for name, norm in list(lm.named_modules()):
        if isinstance(norm, LlamaRMSNorm):
            lm.set_submodule(name, nn.RMSNorm(24, eps=norm.variance_epsilon, dtype=torch.float64))
    return lm


class WatchedModule(TreeGRPOModule):
    """Tree-GRPO that keeps the log-probabilities of its last batch, with their gradient."""

    def score(self, batch: TrainBatch, *, entropy: bool = False) -> TokenScores:
        scores = super().score(batch, entropy=entropy)
        self.logprobs = scores.logprobs
        if self.logprobs.requires_grad:
            self.logprobs.retain_grad()
        return scores


def method(lm: nn.Module | None = None, *, shared: bool = False, **options: object) -> WatchedModule:
    """The method on a model that is there already."""
    made = WatchedModule(pretrained="not loaded", **options)  # type: ignore[arg-type]
    if lm is not None:
        made.policy = PrefixGroupedModel(lm, min_reuse=1.0) if shared else PaddedModel(lm)
    return made


def batches_of(
    module: TreeGRPOModule, groups: Sequence[TrajectoryGroup], max_tokens: int = 100_000, *, on_policy: bool = False
) -> list[TrainBatch]:
    """The micro-batches of one optimiser step; `on_policy` makes every ratio 1."""
    rows = to_rows(groups, module.batch_advantages(groups), module.trains_on, module.credit)
    torch.set_default_dtype(torch.float64)  # rows become float32 by default, and 1 / 3 would be off by 1e-8
    try:
        batches, _ = assemble(
            split_updates(rows, 1),
            max_tokens,
            lambda values, how: values,
            shared=False,
            sum_weights=None if module.credit == "sum" else lambda values: values,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    if on_policy:
        with torch.no_grad():
            for batch in batches:
                batch.old_logprobs = module.score(batch).logprobs
    return batches


def row_of(batch: TrainBatch, leaf: Trajectory) -> int:
    """Which row of a batch a leaf's path is: micro-batches are in an order of their own."""
    ids = [*leaf.steps[-1].context_ids, *leaf.steps[-1].action_ids]
    rows = [row[:n] for row, n in zip(batch.token_ids.tolist(), batch.lengths.tolist(), strict=True)]
    return rows.index(ids)


def gradient(module: TreeGRPOModule, batches: Sequence[TrainBatch]) -> Tensor:
    """The gradient of the optimiser step's loss with respect to all weights, as one vector."""
    assert module.policy is not None
    weights = list(module.policy.parameters())
    loss = torch.stack([module.objective(batch)[0] for batch in batches]).sum()
    return flat(torch.autograd.grad(loss, weights))


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients as one vector."""
    return torch.cat([each.flatten() for each in gradients])


def path_logprobs(lm: nn.Module, leaf: Trajectory) -> list[Tensor]:
    """log p of every step's action tokens along a path, [K][tokens]; the leaf alone, in a forward of its own."""
    last = leaf.steps[-1]
    ids = torch.tensor([[*last.context_ids, *last.action_ids]])
    logp = PaddedModel(lm, check=False)(ids, torch.tensor([ids.shape[1]])).logprobs[0]
    return [logp[len(step.context_ids) : len(step.context_ids) + len(step.action_ids)] for step in leaf.steps]


def gradient_of(lm: nn.Module, value: Tensor) -> Tensor:
    """d value / d weights as one vector."""
    return flat(torch.autograd.grad(value, list(lm.parameters()), retain_graph=True))


def nodes(group: TrajectoryGroup) -> dict[int, tuple[Step, list[int]]]:
    """Every step of the group once, by identity, with the numbers of the leaves that share it."""
    found: dict[int, tuple[Step, list[int]]] = {}
    for number, leaf in enumerate(group.trajectories):
        for step in leaf.steps:
            found.setdefault(id(step), (step, []))[1].append(number)
    return found


class ForkedRollout(ChainRollout):
    """Pairs of chains made into trees without a search: both begin with the first token of the first one's first step.

    A stand-in for tests of training; the second one's log-probabilities are those of its own chain.
    """

    def evaluation(self) -> RolloutStrategy:
        """Chains as they are."""
        return ChainRollout(self.max_steps)

    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        groups = super().collect(prompts, group_size, context)
        for group in groups:
            pairs = zip(group.trajectories[::2], group.trajectories[1::2], strict=True)
            for tree_id, (first, second) in enumerate(pairs):
                _fork(first, second, tree_id)
        return groups


def _fork(first: Trajectory, second: Trajectory, tree_id: int) -> None:
    first.tree_id = second.tree_id = tree_id
    if not first.steps or not second.steps:
        return
    old, other = first.steps[0], second.steps[0]
    head = Step(old.context_ids, old.action_ids[:1], old.logprobs[:1], valid=old.valid)
    context = [*head.context_ids, *head.action_ids]
    first.steps = [head, Step(context, old.action_ids[1:], old.logprobs[1:])]
    second.steps = [head, Step(context, other.action_ids[1:], other.logprobs[1:])]
