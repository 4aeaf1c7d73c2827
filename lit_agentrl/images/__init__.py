"""Images on their way to a policy: named by reference, decoded in one place, resized by one rule."""

from lit_agentrl.images.base import Image, ImageReader, ImageRef, Picture, RowImages, same_images
from lit_agentrl.images.files import MAX_PIXELS, content_key, decode, image_ref
from lit_agentrl.images.resize import Resize

__all__ = [
    "MAX_PIXELS",
    "Image",
    "ImageReader",
    "ImageRef",
    "Picture",
    "Resize",
    "RowImages",
    "content_key",
    "decode",
    "image_ref",
    "same_images",
]
