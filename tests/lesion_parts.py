"""What the tests of synthetic lesions share."""

import hashlib

import numpy as np


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()
