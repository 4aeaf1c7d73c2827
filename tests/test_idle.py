"""Nothing ends well without a word when it has done nothing."""

import pytest
import yaml
from torch.utils.data import DataLoader

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import IdleGuard
from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from runs import options


class Empty(FakeRollouts):
    def train_dataloader(self):
        return DataLoader([])


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        ({"max_epochs": 0}, FakeRollouts),
        ({"max_steps": 0}, FakeRollouts),
        ({"limit_train_batches": 0}, FakeRollouts),
        ({}, Empty),
    ],
)
def test_a_fit_that_trains_nothing_fails(tmp_path, limits, data):
    with pytest.raises(UserError, match=r"Nothing was trained: trainer\.max_epochs="):
        trainer(tmp_path, IdleGuard(), **{"max_epochs": 1} | limits).fit(FakeModule(), datamodule=data())


def test_a_finished_run_says_so_and_no_other_does(tiny_lm, tmp_path, capfd):
    run = options(tiny_lm, tmp_path / "run", "--trainer.max_epochs", "1", "--evaluation.every_n_epochs", "0")
    said = "This run was finished: 1 iterations are saved"
    main(run)
    assert said not in capfd.readouterr().out
    main([*run, "--ckpt_path", "last"])
    out = capfd.readouterr().out
    assert said in out
    assert "--trainer.max_epochs" in out
    main([*run, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    out = capfd.readouterr().out
    assert " 2/2 " in out
    assert "This run was finished" not in out


def test_a_fit_without_iterations_exports_nothing(tiny_lm, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        main(options(tiny_lm, tmp_path / "run", "--trainer.max_epochs", "0", "--evaluation.every_n_epochs", "0"))
    assert end.value.code == 2
    assert "error: Nothing was trained: trainer.max_epochs=0" in capfd.readouterr().err
    assert not (tmp_path / "run" / "export").exists()


def test_a_pipeline_whose_stages_are_finished_says_so(tmp_path, capfd):
    stage = {"command": "make-webshop-demo", "options": {"num_products": 20}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"root": str(tmp_path / "runs"), "stages": {"one": stage}}))
    main(["pipeline", str(tmp_path / "p.yaml")])
    assert "finished already" not in capfd.readouterr().out
    main(["pipeline", str(tmp_path / "p.yaml")])
    assert f"[1/1] one: finished already, in {tmp_path}/runs/one" in capfd.readouterr().out
