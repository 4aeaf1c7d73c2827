"""Tiny made datasets in the layouts that users have, and a source that needs no files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lit_agentrl.envs.dermatology import ImageSource, Sample
from lit_agentrl.types import Split, Step, StopReason, Trajectory, TrajectoryGroup

LABELS = ["melanoma", "melanocytic nevus", "seborrheic keratosis", "actinic keratosis"]


def write_image(path: Path, content: str | None = None) -> Path:
    """A file that is named like an image; nothing here looks inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((content or path.name).encode())
    return path


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], *, delimiter: str = ",", encoding: str = "utf-8"
) -> str:
    lines = [delimiter.join(rows[0])] + [delimiter.join(str(value) for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return str(path)


HAM_CODES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def ham(root: Path, per_class: int = 12, per_lesion: int = 2, **csv: str) -> dict[str, object]:
    """HAM10000 in small: its two folders, some images to a lesion."""
    rows = []
    for dx in HAM_CODES:
        for number in range(per_class):
            id = f"ISIC_{dx}_{number:03d}"
            lesion = f"HAM_{dx}_{number // per_lesion}"
            rows.append({"lesion_id": lesion, "image_id": id, "dx": dx, "dx_type": "histo", "age": 60.0, "sex": "male"})
            write_image(root / f"HAM10000_images_part_{1 + number % 2}" / f"{id}.jpg")
    folders = [str(root / f"HAM10000_images_part_{part}") for part in (1, 2)]
    return {"metadata": write_csv(root / "HAM10000_metadata.csv", rows, **csv), "images": folders}


def class_folders(root: Path, layout: Mapping[str, int]) -> str:
    """So many images in every folder of `layout`, such as `train/melanoma`."""
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(root / folder / f"{number:02d}.jpg", f"{folder}{number}")
    return str(root)


def medmnist(path: Path, sizes: Mapping[str, int], *, num_labels: int = 7, **changed: np.ndarray) -> str:
    """Random images, the classes in turns."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, size in sizes.items():
        arrays[f"{split}_images"] = generator.integers(0, 256, (size, 4, 4, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(size, dtype=np.uint8) % num_labels)[:, None]
    np.savez(path, **{**arrays, **changed})
    return str(path)


def llava(path: Path, records: Sequence[Mapping[str, object]], *, lines: bool = False) -> str:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def dialogue(id: str, image: str | None, *texts: str, **fields: object) -> dict[str, object]:
    turns = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    return {"id": id, "conversations": turns, **({} if image is None else {"image": image}), **fields}


class Pixels(ImageSource):
    """So many single-coloured images of every label in each split, without files."""

    def __init__(self, per_label: int = 3, labels: Sequence[str] = LABELS, **fields: str) -> None:
        self._labels, self.per_label, self.fields = list(labels), per_label, fields

    @property
    def labels(self) -> Sequence[str]:
        return self._labels

    def samples(self, split: Split) -> Sequence[Sample]:
        colour = {"train": 0, "val": 1, "test": 2}[split]
        return [
            Sample(
                f"{number}-{label.split()[0]}",
                np.full((4, 4, 3), 50 * colour + number, dtype=np.uint8),
                label,
                split=split,
                **self.fields,
            )
            for number in range(self.per_label)
            for label in self._labels
        ]


def episode(reply: str, stop: StopReason = StopReason.DONE, **fields: object) -> Trajectory:
    return Trajectory([Step([1], [2], [0.0], action=reply)], stop, **fields)


def answered(task: str, *replies: str | None) -> TrajectoryGroup:
    """A group that answered like this; None for an episode that the environment broke."""
    return TrajectoryGroup(
        task,
        [
            episode("", StopReason.ENV_ERROR) if reply is None else episode(f"<think>x</think><answer>{reply}</answer>")
            for reply in replies
        ],
    )
