import itertools
import math

import pytest
import torch

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import NonFiniteGuard
from lit_agentrl.callbacks.guard import gradients_are_finite
from lit_agentrl.errors import UserError


def broken_at(*steps, value=math.nan):
    """A loss that is `value` at those optimiser steps."""
    return lambda prediction, step: (prediction - 1).square().mean() * (value if step in steps else 1.0)


def fit(tmp_path, module, guard, *, max_epochs=3, num_batches=2, **options):
    run = trainer(tmp_path, guard, max_epochs=max_epochs, **options)
    run.fit(module, datamodule=FakeRollouts(num_batches))
    return run


def changes(module):
    """Which optimiser steps moved the weights, the first not counted."""
    return [not torch.equal(*pair) for pair in itertools.pairwise(module.weights)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 1.0}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}]
)
def test_a_broken_update_leaves_every_bit_and_later_ones_train(tmp_path, value, clip):
    """Steps are 0-based; AdamW would also decay the weights and move them by its momentum."""
    module, guard = FakeModule(broken_at(3, value=value)), NonFiniteGuard()
    run = fit(tmp_path, module, guard, **clip)
    assert changes(module) == [True, True, False, True, True]
    assert guard.num_skipped == 1
    assert run.global_step == 6
    assert run.gradient_clip_val == clip.get("gradient_clip_val")
    assert all(weights.isfinite().all() for weights in module.weights)
    assert run.optimizers[0].state[module.policy.lm.weight]["step"] == 5  # the moments did not see the update either


def test_without_the_guard_the_weights_are_lost(tmp_path):
    """The test above fails without the callback."""
    module = FakeModule(broken_at(3))
    trainer(tmp_path, max_epochs=3, gradient_clip_val=1.0).fit(module, datamodule=FakeRollouts())
    assert not module.weights[-1].isfinite().any()


def test_one_broken_micro_batch_spoils_its_update_only(tmp_path):
    """The loss of the first micro-batch is NaN where no gradient shows it."""

    class Module(FakeModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + (math.nan if self.current_epoch == 1 and batch_idx == 0 else 0.0)

    module = Module()
    fit(tmp_path, module, guard := NonFiniteGuard(), num_batches=3, accumulate_grad_batches=3)
    assert guard.num_skipped == 1
    epochs = module.weights[2::3]
    assert [torch.equal(*pair) for pair in itertools.pairwise(epochs)] == [True, False]


def test_the_iterations_count_is_logged_and_zero_otherwise(tmp_path):
    logged = []

    class Spy(NonFiniteGuard):
        def on_train_epoch_end(self, trainer, pl_module):
            logged.append(float(trainer.callback_metrics["skipped_updates"]))

    fit(tmp_path, FakeModule(broken_at(2, 3, 5)), Spy(), max_epochs=4)
    assert logged == [0.0, 2.0, 1.0, 0.0]


def test_stops_after_so_many_in_a_row(tmp_path):
    module = FakeModule(broken_at(0, 1, 3, 4, 5))
    with pytest.raises(UserError, match="loss of 3 updates in a row was NaN or infinite, up to iteration 3") as error:
        fit(tmp_path, module, NonFiniteGuard(max_skipped=3), max_epochs=9)
    assert "lower learning rate" in str(error.value)
    assert module.weights[-1].isfinite().all()


def test_broken_gradients_of_a_finite_loss_are_named(tmp_path):
    def infinite_slope(prediction, step):
        return (prediction - prediction.detach()).abs().sqrt().sum()  # 0, and the root's slope at 0 is infinite

    with pytest.raises(UserError, match="gradients of 1 updates"):
        fit(tmp_path, FakeModule(infinite_slope), NonFiniteGuard(max_skipped=1))


def test_updates_with_nothing_to_learn_do_nothing_and_stop_nothing(tmp_path):
    class Module(FakeModule):
        num_step_tokens = 0

        def training_step(self, batch, batch_idx):
            self.num_step_tokens = 0 if self.global_step in (1, 2, 3) else 7
            return super().training_step(batch, batch_idx)

    module = Module()
    fit(tmp_path, module, guard := NonFiniteGuard(max_skipped=2))
    assert changes(module) == [False, False, False, True, True]
    assert guard.num_skipped == 3


def test_learning_rates_go_on(tmp_path):
    class Module(FakeModule):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    run = fit(tmp_path, Module(broken_at(0)), NonFiniteGuard(), max_epochs=1)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


def test_the_row_survives_a_resume():
    guard, resumed = NonFiniteGuard(), NonFiniteGuard()
    guard.num_skipped, guard._num_in_a_row = 7, 2
    resumed.load_state_dict(guard.state_dict())
    assert (resumed.num_skipped, resumed._num_in_a_row) == (7, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finiteness_is_exact(dtype):
    parameters = [torch.zeros(2, dtype=dtype, requires_grad=True) for _ in range(3)] + [
        torch.zeros(0, requires_grad=True)
    ]
    parameters[0].grad = torch.tensor([1e38, -1e38], dtype=dtype)  # finite, though its Euclidean norm overflows
    parameters[3].grad = torch.zeros(0)
    assert gradients_are_finite(parameters)
    for value in (math.nan, math.inf, -math.inf):
        parameters[1].grad = torch.tensor([0.0, value], dtype=dtype)
        assert not gradients_are_finite(parameters)
    assert gradients_are_finite([])


def test_refuses_a_limit_below_one():
    with pytest.raises(UserError, match="max_skipped=0"):
        NonFiniteGuard(max_skipped=0)
