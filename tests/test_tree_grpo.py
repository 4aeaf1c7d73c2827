"""Tree-GRPO as a method: numbers by hand, parity with the authors' code, whole trees, what is logged, and runs."""

import math
import random

import pytest
import torch

from lit_agentrl import distributed
from lit_agentrl.advantages import standardize
from lit_agentrl.datamodules import RolloutDataModule
from lit_agentrl.datamodules.collector import Order
from lit_agentrl.datamodules.signal import without_failures
from lit_agentrl.envs import EchoSuite
from lit_agentrl.errors import UserError
from lit_agentrl.rows import split_updates, to_rows
from lit_agentrl.types import Step, StopReason, Trajectory, TrajectoryGroup
from runs import checkpoint, fit, metrics, options, run_alone
from tree_parts import SHAPES, UNEVEN, Node, forest, method

ROOT_HALF = 1 / math.sqrt(2)  # (1 - mean) / std of rewards 1 and 0


def leaf(reward: float, tree: int = 0, num_steps: int = 1) -> Trajectory:
    steps = [Step([1] * (t + 1), [7, 8], [-0.1, -0.2]) for t in range(num_steps)]
    return Trajectory(steps, tree_id=tree, total_reward=reward)


def group(*leaves: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup("task", list(leaves))


def values(module, *leaves: Trajectory) -> list[float]:
    """The advantage of each leaf, which all of its steps carry."""
    advantages = module.advantages(group(*leaves))
    assert [len(steps) for steps in advantages] == [len(each.steps) for each in leaves]
    assert all(len(set(steps)) == 1 for steps in advantages)
    return [steps[0] for steps in advantages]


FOREST = [leaf(1, 0, 2), leaf(0, 0), leaf(1, 1, 3), leaf(1, 1)]

# --- the paper ---


def test_the_defaults_by_hand():
    """Tree 0 pays 1, 0 (std 0.7071); tree 1 is flat; the prompt's mean is 3/4, its std 1/2."""
    expected = [0.5 + ROOT_HALF, -1.5 - ROOT_HALF, 0.5, 0.5]
    assert values(method(), *FOREST) == pytest.approx(expected, abs=1e-5)


def test_weights_and_no_std_by_hand():
    module = method(intra_weight=2.0, inter_weight=0.5, scale="none")
    assert values(module, *FOREST) == pytest.approx([2 * 0.5 + 0.125, -2 * 0.5 - 0.375, 0.125, 0.125])


def test_without_the_intra_term_it_is_grpo():
    expected = standardize(torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)).tolist()
    assert values(method(intra_weight=0.0), *FOREST) == expected


def test_flat_trees_that_differ_learn_from_the_prompt_alone():
    module, leaves = method(), [leaf(1, 0), leaf(1, 0), leaf(0, 1), leaf(0, 1)]
    assert values(method(inter_weight=0.0), *leaves) == [0.0] * 4
    assert values(module, *leaves) == pytest.approx([math.sqrt(3) / 2] * 2 + [-math.sqrt(3) / 2] * 2, abs=1e-5)


def test_the_order_of_the_leaves_changes_nothing():
    order = [2, 0, 3, 1]
    straight = values(method(), *FOREST)
    assert values(method(), *[FOREST[i] for i in order]) == [straight[i] for i in order]


def test_failed_leaves_are_out():
    """A leaf that the environment broke is in no mean of its tree or prompt."""
    broken = leaf(99.0, 0)
    broken.stop_reason = StopReason.ENV_TIMEOUT
    assert values(method(), *without_failures(group(*FOREST, broken)).trajectories) == values(method(), *FOREST)


# --- the authors' code, `singleton: raw`, and where zero is right ---


def test_parity_of_chains_alone():
    """N = 0: every tree has one leaf, and A is A_inter + R there. Here the lone leaf's term is 0."""
    leaves = [leaf(1.0, 0), leaf(0.2, 1), leaf(0.8, 2)]
    inter = values(method(intra_weight=0.0), *leaves)
    assert values(method(singleton="raw"), *leaves) == pytest.approx(
        [a + r for a, r in zip(inter, (1.0, 0.2, 0.8), strict=True)], abs=1e-5
    )
    assert values(method(), *leaves) == inter


def test_parity_of_one_leaf_alone():
    """One tree of one leaf: 2 R there, 0 here."""
    assert values(method(singleton="raw"), leaf(0.8)) == pytest.approx([1.6], abs=1e-5)
    assert values(method(), leaf(0.8)) == [0.0]


def test_parity_of_a_single_tree():
    """M = 1: both terms are the same, A = 2 A_intra, also there."""
    leaves = [leaf(1.0), leaf(0.0), leaf(0.5)]
    for singleton in ("raw", "zero"):
        intra = values(method(inter_weight=0.0, singleton=singleton), *leaves)
        assert values(method(singleton=singleton), *leaves) == [2 * a for a in intra]


def test_parity_of_a_mixed_forest():
    """Trees {1, 0.2} and {0.8}: by hand, with the lone leaf's raw reward. Mean 2/3, std 0.416333."""
    leaves = [leaf(1.0, 0), leaf(0.2, 0), leaf(0.8, 1)]
    inter = [(r - 2 / 3) / 0.416333 for r in (1.0, 0.2, 0.8)]
    expected = [inter[0] + ROOT_HALF, inter[1] - ROOT_HALF, inter[2] + 0.8]
    assert values(method(singleton="raw"), *leaves) == pytest.approx(expected, abs=1e-5)


def test_equal_leaves_are_exactly_zero():
    """Two trees of 7 leaves of 0.8 (N = 6): float32 noise over 1e-6 is -0.162 there, and silent here."""
    leaves = [leaf(0.8, i // 7) for i in range(14)]
    for singleton in ("raw", "zero"):
        assert values(method(singleton=singleton), *leaves) == [0.0] * 14


@pytest.mark.parametrize(("credit", "second"), [("sum", 0.577), ("mean", 0.289), ("sqrt", 0.408)])
def test_the_example_of_the_docs(credit, second):
    """What the rows of a tree push each step with; rewards 1, 0, 0, of which the first two share a second step."""
    tree = forest(Node(1, [Node(1, [Node(1, 1.0), Node(1, 0.0)]), Node(1, 0.0)]))
    module = method(inter_weight=0.0, credit=credit)
    (rows,) = to_rows([tree], [module.advantages(tree)], credit=credit)
    pushed: dict[tuple[int, ...], float] = {}
    for row in rows:
        for at in (i for i, sampled in enumerate(row.action_mask) if sampled):
            path = tuple(row.token_ids[: at + 1])
            pushed[path] = pushed.get(path, 0.0) + row.advantages[at] * (row.weights[at] if row.weights else 1.0)
    worth = [pushed[path] for path in sorted(pushed, key=len)]
    assert worth[0] == pytest.approx(0, abs=1e-9)
    assert sorted(worth[1:]) == pytest.approx(sorted([second, -0.577, 1.155, -0.577]), abs=1e-3)


# --- a tree is never torn ---


def test_a_tree_is_never_torn_between_optimiser_steps():
    """Prompts are dealt whole, whatever their trees and however many steps there are; no row is lost or doubled."""
    rng = random.Random(0)
    for num_updates in (1, 2, 3, 5):
        forests = []
        for prompt in range(7):
            trees = [rng.choice(list(SHAPES.values())) for _ in range(rng.randint(1, 3))]
            forests.append(forest(*trees, seed=prompt, prompt=[100 + prompt, 5]))
        module = method()
        rows = to_rows(forests, module.batch_advantages(forests), module.trains_on)
        updates = split_updates(rows, num_updates)
        assert len(updates) == num_updates
        owners = [sorted({row.token_ids[0] - 100 for row in update}) for update in updates]
        assert sorted(prompt for owned in owners for prompt in owned) == list(range(7))  # each in one step
        assert [sum(row.token_ids[0] == 100 + p for u in updates for row in u) for p in range(7)] == [
            len(each.trajectories) for each in forests
        ]


class Orchard(RolloutDataModule):
    """Every prompt gives two trees; those with an even number are flat, so that dynamic sampling replaces them."""

    def _roll_out(self, prompts, group_size, sampling, iteration, **_):
        groups = []
        for prompt in prompts:
            made = forest(UNEVEN, UNEVEN, seed=prompt.number, prompt=[prompt.number])
            for each in made.trajectories:
                each.total_reward *= prompt.number % 2
            groups.append(TrajectoryGroup(str(prompt.number), made.trajectories))
        return groups


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_rounds", [1, 3])
def test_a_tree_is_never_torn_between_ranks(monkeypatch, num_ranks, max_rounds):
    """A prompt is played by one rank, with all of its trees."""
    collected = []
    for rank in range(num_ranks):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, num_ranks))
        monkeypatch.setattr(distributed, "reduce_integers", lambda counts, how="sum": counts)
        data = Orchard(EchoSuite(), "no tokenizer", num_prompts=7, max_rounds=max_rounds)
        collected.append(data._collect(Order(0, 0, 0)).trained)
    for groups in collected:
        assert all(sorted({t.tree_id for t in each.trajectories}) == [0, 1] for each in groups)
        assert all(len(each.trajectories) == 10 for each in groups)
    prompts = [each.prompt_id for groups in collected for each in groups]
    assert len(set(prompts)) == len(prompts)
    if max_rounds == 1:
        assert sorted(prompts) == [str(i) for i in range(7)]
    else:
        assert all(int(prompt) % 2 for prompt in prompts)


# --- what is logged ---


def test_statistics_by_hand():
    """Prompt 1: UNEVEN (5 leaves, differing) and a chain. Prompt 2: two flat trees of 1 and 2 leaves. Then nothing."""
    module = method()
    empty = module.advantage_sums
    flat_tree = Node(2, [Node(1, 0.5), Node(3, 0.5)])
    module.batch_advantages([forest(UNEVEN, Node(2, 1.0)), forest(Node(4, 0.5), flat_tree), group()])
    # UNEVEN: 23 sampled tokens in rows of 9 + 7 + 8 + 9 + 7 = 40. Chains: 2 and 4. flat_tree: 6 in rows of 3 + 5.
    assert module.advantage_sums == {
        "tree_grpo/flat_trees": (3.0, 4.0),
        "tree_grpo/flat_prompts": (1.0, 2.0),
        "tree_grpo/lone_leaves": (2.0, 9.0),
        "tree_grpo/leaves": (9.0, 4.0),
        "tree_grpo/shared_tokens": (40 - 23 + 2.0, 40 + 2 + 4 + 8.0),
    }
    assert list(module.advantage_sums) == list(empty)
    module.batch_advantages([])  # a rank without groups logs the same names
    assert module.advantage_sums == empty


# --- options and runs ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"intra_weight": -1.0}, "intra_weight=-1"),
        ({"inter_weight": math.inf}, "inter_weight=inf"),
        ({"intra_weight": 0.0, "inter_weight": 0.0}, "nothing to learn from"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        method(**wrong)


TREES = (
    '--data.rollout={"class_path": "tree_parts.ForkedRollout", "init_args": {"max_steps": 2}}',
    '--model={"class_path": "TreeGRPOModule"}',
)
SGD = '--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}'


def test_runs_from_end_to_end(tiny_lm, tmp_path):
    """All that is promised is logged, the weights move, and each credit moves them elsewhere.

    Recomputed log-probabilities make every ratio of a single update 1, so its weighted mean is 1 whatever the weights.
    """
    moved = {}
    for credit in ("sum", "mean", "sqrt"):
        run = tmp_path / credit
        fit(tiny_lm, run, *TREES, f"--model.credit={credit}", "--model.old_logprobs=recompute")
        rows = [row for row in metrics(run) if row.get("reward/mean")]
        assert len(rows) == 2
        for row in rows:
            assert float(row["train/ratio"]) == pytest.approx(1.0, abs=1e-5)
            assert float(row["tree_grpo/leaves"]) == 2
            assert float(row["tree_grpo/lone_leaves"]) == 0
            assert 0 < float(row["tree_grpo/shared_tokens"]) < 0.5
            assert float(row["tree_grpo/flat_prompts"]) == float(row["zero_signal"])
            assert 0 <= float(row["tree_grpo/flat_trees"]) < 1
        lora = {name: value for name, value in checkpoint(run)["state_dict"].items() if "lora_B" in name}
        moved[credit] = torch.cat([value.flatten() for value in lora.values()])
        assert moved[credit].abs().max() > 1e-3
    assert (moved["sum"] - moved["mean"]).abs().max() > 1e-4
    assert (moved["sqrt"] - moved["mean"]).abs().max() > 1e-4


def test_two_optimiser_steps_see_their_own_trees(tiny_lm, tmp_path):
    """One prompt each; the second one's ratio is off 1 by then, and both are counted."""
    fit(tiny_lm, tmp_path, *TREES, "--model.credit=mean", "--data.num_updates=2", "--trainer.max_epochs=1")
    assert checkpoint(tmp_path)["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["mean", "sqrt"])
def test_two_ranks_train_as_one(tiny_lm, tmp_path, credit):
    """Weights add up over ranks; three prompts, so one rank has twice the other's. SGD: a step is the gradient."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--data.num_prompts=3", "--data.max_tokens=512", "--trainer.max_epochs=1", f"--model.credit={credit}")
    for run, ranks in ((one, ()), (two, ("--trainer.strategy", "ddp", "--trainer.devices", "2"))):
        given = options(tiny_lm, run, *TREES, *more, *ranks)
        at = given.index("--model.optimizer.lr")
        code, output = run_alone([*given[:at], *given[at + 2 :], SGD])
        assert code == 0, output
    first, second = (next(row for row in metrics(run) if row.get("rows")) for run in (one, two))
    for name in first:
        if name.startswith("tree_grpo/"):
            assert float(second[name]) == pytest.approx(float(first[name]), abs=1e-6), name
    for name, value in checkpoint(one)["state_dict"].items():
        torch.testing.assert_close(checkpoint(two)["state_dict"][name], value, rtol=1e-4, atol=1e-6)
        assert "lora_B" not in name or value.abs().max() > 1e-4
