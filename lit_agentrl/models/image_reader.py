"""Images as one model takes them: decoded, resized by policy, processed by the model's own processor, and remembered.

The processors are transformers' PIL ones, which need no torchvision. A picture depends on its image and on the settings
of its reader alone, never on what it is processed beside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor

from lit_agentrl.errors import ImageError, UserError
from lit_agentrl.images import Image, ImageReader, ImageRef, Picture, Resize, content_key, decode
from lit_agentrl.models.image_text import image_text, markup_of
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.models.pretrained import read_config, resolve
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.models.vision_families import FAMILIES, family_of, has_vision

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lit_agentrl.models.pretrained import Source

__all__ = ["HFImageReader", "Resize", "load_image_reader"]

CACHE_BYTES = 512 * 2**20
"""Of processed pictures: about 20 of the largest that Qwen2.5-VL takes, 15,000 of 112 x 112."""

log = logging.getLogger(__name__)


class HFImageReader:
    """Reads images by an image processor of transformers; any number of threads may use it at once.

    Args:
        config: The model's configuration.
        tokenizer: The tokenizer that belongs to it.
        processor: Its image processor, with the PIL backend.
        resize: What pictures are resized to before the processor.
        cache_bytes: How many bytes of processed pictures are kept at most; those used longest ago go first.

    Raises:
        UserError: The model's family is not known, or the tokenizer lacks its tokens for images.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        processor: Any,
        resize: Resize | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.config, self.processor, self.resize = config, processor, resize or Resize()
        self.family = family_of(config)
        self.markup = markup_of(config, tokenizer)
        self.placeholder = self.markup.placeholder
        self.image_token_id = int(config.image_token_id)
        self.notes: Counter[str] = Counter()
        """How many images were odd and put right, by kind (`images.decode`)."""
        self._settings = hashlib.sha256(
            f"{config.model_type} {type(processor).__name__} {self.resize} "
            f"{json.dumps(processor.to_dict(), sort_keys=True, default=str)}".encode()
        ).hexdigest()
        self._cache = _Cache(cache_bytes)

    @property
    def cached_bytes(self) -> int:
        """What the pictures kept take."""
        return self._cache.size

    def read(self, image: Image) -> Picture:
        """The picture of an image, from the cache where it is there; threads that want the same one share the work.

        Raises:
            ImageError: The image cannot be read (`images.decode`), or the processor refuses it.
        """
        digest = hashlib.sha256(f"{content_key(image)} {self._settings}".encode()).digest()
        key = int.from_bytes(digest[:8]) >> 1
        return self._cache.get(key, lambda: self._process(image, key))

    def inputs(self, images: Sequence[Sequence[Image]], token_ids: Tensor, lengths: Tensor) -> VisionInputs | None:
        """The images [B] of right-padded rows [B, L]; None where no row shows one.

        Raises:
            ImageError: An image cannot be read.
            UserError: A row's images do not fill its placeholders.
        """
        if not any(images):
            return None
        pictures = [[self.read(image) for image in row] for row in images]
        return VisionInputs.from_rows(
            self.config,
            [[picture.pixels for picture in row] for row in pictures],
            token_ids,
            lengths,
            content_ids=[[picture.key for picture in row] for row in pictures],
        )

    def _process(self, image: Image, key: int) -> Picture:
        picture = self.resize(decode(image, self.resize.refuse_above, self.notes))
        options = {"return_row_col_info": True} if self.family.has_row_dimension else {}
        try:
            processed = self.processor(picture, return_tensors="pt", **options)
        except (ValueError, ZeroDivisionError) as error:
            raise ImageError(
                f"The model's image processor ({type(self.processor).__name__}) refuses {_name(image)}, "
                f"{picture.width} x {picture.height}: {error} Resize it (`resize`), or leave it out."
            ) from error
        known = (*self.family.names, *self.family.optional)
        pixels = self.family.normal({name: processed[name] for name in known if name in processed})
        count = self.family.count(self.config, pixels)
        return Picture(key, image_text(self.config, self.markup, count, processed), pixels)


def load_image_reader(
    pretrained: str, resize: Resize | None = None, cache_bytes: int = CACHE_BYTES
) -> ImageReader | None:
    """What reads images for the model `pretrained` (see `load_policy`); None for a model of text.

    A vision-language model of a family whose images are not known counts as a model of text, and the log says so.

    Raises:
        UserError: Nothing to load, or the model's folder has no image processor.
    """
    source = resolve(pretrained)
    config = read_config(pretrained, source)
    if not has_vision(config):
        return None
    if config.model_type not in FAMILIES:
        log.warning("Images for a model of type %r are not supported: %s do.", config.model_type, ", ".join(FAMILIES))
        return None
    return HFImageReader(config, load_tokenizer(pretrained), _load_processor(pretrained, source), resize, cache_bytes)


def _load_processor(pretrained: str, source: Source) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]  # upstream's
            source.processor, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"pretrained={pretrained!r} takes images, but its image processor cannot be loaded: {error} Put the "
            "preprocessor_config.json of the original model into its folder."
        ) from error


class _Cache:
    """The pictures used last, as many as fit into so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._lock = threading.Lock()
        self._pictures: OrderedDict[int, Picture] = OrderedDict()
        self._underway: dict[int, Future[Picture]] = {}

    def get(self, key: int, make: Any) -> Picture:
        """The picture of a key, made by the first thread that wants it; the others wait for that one."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
            others = self._underway.get(key)
            mine = self._underway.setdefault(key, Future()) if others is None else None
        if mine is None:
            assert others is not None
            return others.result()
        try:
            picture: Picture = make()
        except BaseException as error:
            with self._lock:
                del self._underway[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._underway[key]
            self._keep(key, picture)
        mine.set_result(picture)
        return picture

    def _keep(self, key: int, picture: Picture) -> None:
        self._pictures[key] = picture
        self.size += _bytes(picture.pixels)
        while self.size > self.limit:
            _, oldest = self._pictures.popitem(last=False)
            self.size -= _bytes(oldest.pixels)


def _bytes(pixels: Mapping[str, Tensor]) -> int:
    return sum(value.untyped_storage().nbytes() for value in pixels.values())


def _name(image: Image) -> str:
    return f"the image {image.path}" if isinstance(image, ImageRef) else f"an array {list(image.shape)}"
