import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import HFExport, IterationCheckpoint
from lit_agentrl.errors import UserError
from lit_agentrl.models import export as export_module


class Interrupt(Callback):
    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise self.exception


@pytest.fixture
def exports(monkeypatch):
    """The arguments of each export, which here only makes the folder."""
    calls = []

    def export(lm, tokenizer, folder, *, merge=True):
        calls.append((lm, tokenizer, folder.name, merge))
        folder.mkdir()

    monkeypatch.setattr(export_module, "export", export)
    return calls


def test_exports_the_trained_policy_at_the_end(tmp_path, exports, capsys):
    module, data = FakeModule(), FakeRollouts()
    trainer(tmp_path, HFExport(merge=False)).fit(module, datamodule=data)
    assert exports == [(module.policy.lm, data.tokenizer, "export", False)]
    assert f"exported the policy to {tmp_path / 'export'}" in capsys.readouterr().out


class LanguageModule(FakeModule):
    """Trains the output layer of a real language model."""

    def __init__(self, folder):
        super().__init__()
        self.policy.lm = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch, batch_idx):
        return self.policy.lm(torch.arange(12).view(3, 4), labels=torch.arange(12).view(3, 4)).loss

    def on_train_batch_end(self, *_):
        pass


def test_the_folder_loads_as_the_trained_policy(tmp_path, tiny_lm):
    module, data = LanguageModule(tiny_lm), FakeRollouts()
    data.tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    untrained = {name: value.clone() for name, value in module.policy.lm.state_dict().items()}
    trainer(tmp_path, HFExport()).fit(module, datamodule=data)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in module.policy.lm.state_dict().items())
    assert not any(torch.equal(loaded[name], value) for name, value in untrained.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab() == data.tokenizer.get_vocab()


def test_exports_on_schedule_do_not_look_like_the_end(tmp_path, exports):
    trainer(tmp_path, HFExport(every_n_epochs=2, at_end=False), max_epochs=5).fit(
        FakeModule(), datamodule=FakeRollouts()
    )
    assert [name for _, _, name, _ in exports] == ["export_iteration_000001", "export_iteration_000003"]


@pytest.mark.parametrize("exception", [RuntimeError("broken"), KeyboardInterrupt()])
def test_no_export_of_a_run_that_did_not_end(tmp_path, exports, exception):
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(tmp_path, Interrupt(exception), HFExport()).fit(FakeModule(), datamodule=FakeRollouts())
    assert exports == []


def test_a_run_killed_before_its_export_gets_it_when_resumed(tmp_path, exports):
    fit = {"max_epochs": 2, "enable_checkpointing": True}
    first = FakeModule()
    trainer(tmp_path, IterationCheckpoint(), **fit).fit(first, datamodule=FakeRollouts())
    resumed = FakeModule(lambda *_: pytest.fail("nothing is left to train"))
    trainer(tmp_path, HFExport(), IterationCheckpoint(), **fit).fit(
        resumed, datamodule=FakeRollouts(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert [(lm, name) for lm, _, name, _ in exports] == [(resumed.policy.lm, "export")]
    assert resumed.policy.lm.weight.equal(first.policy.lm.weight)


def test_a_trial_run_leaves_nothing(tmp_path, exports):
    trainer(tmp_path, HFExport(), fast_dev_run=True).fit(FakeModule(), datamodule=FakeRollouts())
    assert exports == []


def test_refuses_before_training_what_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match="HFExport needs a module with a `policy`, but BoringModel has none"):
        trainer(tmp_path, HFExport()).fit(BoringModel(), datamodule=BoringDataModule())
    with pytest.raises(UserError, match="BoringDataModule has no `tokenizer`"):
        trainer(tmp_path, HFExport()).fit(FakeModule(), datamodule=BoringDataModule())


def test_refuses_a_negative_interval():
    with pytest.raises(UserError, match="every_n_epochs=-1"):
        HFExport(every_n_epochs=-1)
