"""One folder a class, as DermNet comes: `train/melanoma/1.jpg`, or `melanoma/1.jpg` without splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lit_agentrl.envs.dermatology.labels import CODES
from lit_agentrl.envs.dermatology.selection import Selection
from lit_agentrl.envs.dermatology.source import FileSource, Listing, file_record
from lit_agentrl.envs.dermatology.splits import Record
from lit_agentrl.envs.dermatology.tables import SUFFIXES, images_below
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

SPLIT_FOLDERS: Mapping[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


class ClassFolders(FileSource):
    """Images in folders named after their class, below folders named after their split or without.

    A layout without val or test gives it a share of the train images. Nothing says here which images show one lesion:
    keep those in one split folder. A class is called as its folder, in lower case and with spaces for `_` and `-`.

    Args:
        root: The folder that holds `train` and `test` (and `val`), or the class folders.
        select: Which images are used, and in which split.

    Raises:
        UserError: The folder is missing or not laid out like that.
    """

    codes = CODES

    def __init__(self, root: str, select: Selection = Selection()) -> None:  # noqa: B008  # frozen
        super().__init__(select)
        self._root = Path(root).expanduser()

    @property
    def where(self) -> str:
        """The loader and its folder."""
        return f"{type(self).__name__} ({self._root})"

    def listing(self) -> Listing:
        """Every image below a class folder; its path below the root is its id."""
        if not self._root.is_dir():
            raise UserError(f"{self._root} is not there. Give the folder that holds the class folders.")
        splits = [folder for folder in _folders(self._root) if folder.name.lower() in SPLIT_FOLDERS]
        others = [folder.name for folder in _folders(self._root) if folder not in splits]
        if splits and others:
            raise UserError(
                f"{self._root} holds folders of splits ({', '.join(folder.name for folder in splits)}) and others "
                f"({', '.join(others[:5])}). Put the class folders below the splits, or take the splits away."
            )
        tops: list[tuple[Path, Split | None]] = [(top, SPLIT_FOLDERS[top.name.lower()]) for top in splits]
        found = [entry for top, split in tops or [(self._root, None)] for entry in self._classes(top, split)]
        if not any(records for _, records in found):
            raise UserError(
                f"No images in {self._root}: looked for {', '.join(SUFFIXES)} in folders such as train/melanoma or "
                "melanoma."
            )
        return Listing([record for _, records in found for record in records], classes=[name for name, _ in found])

    def _classes(self, top: Path, split: Split | None) -> Iterator[tuple[str, list[Record]]]:
        for folder in _folders(top):
            files = images_below(folder)
            yield (
                folder.name,
                [file_record(path, path.relative_to(self._root).as_posix(), folder.name, (), split) for path in files],
            )


def _folders(parent: Path) -> list[Path]:
    """The folders in it, without hidden ones and what macOS leaves in archives."""
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
