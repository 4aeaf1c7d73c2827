"""Dermatology tasks as a configuration names them."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from derm_parts import class_folders, dialogue, ham, llava, medmnist, write_image
from lit_agentrl import datamodules as _datamodules  # noqa: F401  # so that classes have short names, as on the command line
from lit_agentrl import envs as _envs  # noqa: F401
from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.envs.dermatology import DermatologyPanel, RecognitionSuite
from lit_agentrl.types import EnvironmentSuite


def built(kind: type, text: str) -> object:
    parser = ArgumentParser()
    parser.add_argument("--it", type=kind)
    return parser.instantiate(parser.parse_object({"it": yaml.safe_load(text)})).it


def test_every_layout_by_its_short_name(tmp_path: Path) -> None:
    files = ham(tmp_path / "ham")
    folders = class_folders(tmp_path / "folders", {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    npz = medmnist(tmp_path / "m.npz", {"train": 14, "val": 7, "test": 7})
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg")
    talks = llava(
        tmp_path / "t.json", [dialogue("1", "a.jpg", "q", "a melanoma"), dialogue("2", "b.jpg", "q", "a nevus")]
    )
    sources = {
        f"{{class_path: HAM10000, init_args: {{metadata: {files['metadata']}, images: {files['images']}, "
        "select: {max_per_class: 3, seed: 4}}}": 21,
        f"{{class_path: ISIC, init_args: {{metadata: {files['metadata']}, images: {files['images']}, "
        "select: {labels: [melanoma, melanocytic nevus], other_labels: drop}}}": 16,
        f"{{class_path: ClassFolders, init_args: {{root: {folders}, select: {{names: {{a: psoriasis}}}}}}}}": 4,
        f"{{class_path: MedMNIST, init_args: {{path: {npz}}}}}": 14,
        f"{{class_path: LlavaImages, init_args: {{path: {talks}}}}}": 2,
    }
    for source, num_train in sources.items():
        suite = built(EnvironmentSuite, f"{{class_path: RecognitionSuite, init_args: {{source: {source}}}}}")
        assert isinstance(suite, RecognitionSuite)
        assert len(suite.tasks("train")) == num_train, source


def test_a_panel_with_a_graph_and_a_hint(tmp_path: Path) -> None:
    pytest.importorskip("networkx")
    files = ham(tmp_path)
    source = f"{{class_path: HAM10000, init_args: {{metadata: {files['metadata']}, images: {files['images']}}}}}"
    panel = built(
        EnvironmentSuite,
        f"""
        class_path: DermatologyPanel
        init_args:
          num_recognition: 5
          num_conversation: 4
          recognition:
            class_path: RecognitionSuite
            init_args:
              source: {source}
              style: long
              think_tag: thinking
              accuracy: [7, -1]
              format_scale: 2
              synonyms: {{melanoma: [bad mole]}}
              hint: {{share: 1.0, num_labels: 2}}
          conversation:
            class_path: ConversationSuite
            init_args:
              source: {source}
              facts: {{class_path: lit_agentrl.envs.dermatology.GraphFacts}}
        """,
    )
    assert isinstance(panel, DermatologyPanel)
    assert len(panel.tasks("test")) == 9
    assert "Hint:" in panel.make(panel.tasks("train")[0]).reset().text
    assert panel.stop_strings == ("</answer>",)


def test_a_mixture_for_supervised_training(tmp_path: Path) -> None:
    talks = llava(tmp_path / "t.json", [dialogue(str(number), None, "q", "a") for number in range(4)])
    mixture = built(
        ConversationSource,
        f"""
        class_path: Mixture
        init_args:
          shares: [0.8, 0.2]
          sources:
            - {{class_path: LlavaConversations, init_args: {{path: {talks}}}}}
            - class_path: Walkthroughs
              init_args: {{environment: {{class_path: EchoSuite}}, num_tasks: 3}}
        """,
    )
    assert len(list(mixture.conversations())) == 5
