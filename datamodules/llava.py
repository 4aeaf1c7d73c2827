"""Conversations about images, in LLaVA's layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.envs.dermatology.conversation import CONVERSATION_PROMPT
from lit_agentrl.envs.dermatology.llava import Dialogue, read_dialogues
from lit_agentrl.envs.dermatology.samples import file_image
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Observation

log = logging.getLogger(__name__)


class LlavaConversations(ConversationSource):
    """`{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}`, all turns kept.

    The image stands before the first question; `<image>` is taken out of the texts. Records whose image is not there
    are left out and counted; records without one are conversations in text.

    Args:
        path: The `.json` (an array) or `.jsonl` file.
        image_root: What image paths are relative to; None for the file's folder.
        system: The system prompt of records that bring none; by default the one of `ConversationSuite`.

    Raises:
        UserError: There is no such file.
    """

    def __init__(self, path: str, image_root: str | None = None, system: str = CONVERSATION_PROMPT) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"No file {path!r}. Give a .json or .jsonl file of conversations in LLaVA's layout.")
        self.root = self.path.parent if image_root is None else Path(image_root).expanduser()
        self.system = system

    def conversations(self) -> Iterable[Conversation]:
        """One conversation per record whose image is there.

        Raises:
            UserError: The file is not as it should be, or no image is there.
        """
        kept: list[Dialogue] = []
        missing: list[str] = []
        for dialogue in read_dialogues(self.path):
            if dialogue.image is None or (self.root / dialogue.image).is_file():
                kept.append(dialogue)
            else:
                missing.append(dialogue.image)
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        if not kept:
            raise UserError(f"{self.path}: none of its images is in {self.root}: {names}. Set image_root.")
        if missing:
            log.warning("%s: %d conversations are left out, without their image: %s", self.path, len(missing), names)
        return [self._turns(dialogue) for dialogue in kept]

    def _turns(self, dialogue: Dialogue) -> Conversation:
        images = () if dialogue.image is None else (file_image(self.root / dialogue.image),)
        system = dialogue.system or self.system
        return [
            (Observation(question, system if number == 0 else "", images=images if number == 0 else ()), answer)
            for number, (question, answer) in enumerate(dialogue.turns)
        ]
