"""What the tests of synthetic lesions share: a linear probe, and digests of pictures."""

import hashlib

import numpy as np

from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def pixel_statistics(pixels: np.ndarray, cells: int = 7) -> np.ndarray:
    """Mean and deviation of every colour on a grid, and how often each of 64 colours occurs."""
    image = pixels.astype(np.float32) / 255
    step = len(image) // cells
    blocks = image[: step * cells, : step * cells].reshape(cells, step, cells, step, 3)
    levels = (image * 3.999).astype(int)
    counts = np.bincount((levels @ [16, 4, 1]).ravel(), minlength=64) / levels[..., 0].size
    return np.concatenate([blocks.mean((1, 3)).ravel(), blocks.std((1, 3)).ravel(), np.sqrt(counts)])


def probe_accuracy(lesions: SyntheticLesions, ridge: float = 100.0) -> float:
    """Accuracy on the test split of a linear classifier (ridge regression on one-hot labels) of pixel statistics."""
    labels = list(lesions.labels)
    found = {}
    for split in ("train", "test"):
        samples = lesions.samples(split)
        features = np.stack([pixel_statistics(sample.shown()) for sample in samples])
        found[split] = features, np.array([labels.index(sample.label) for sample in samples])
    (x, y), (x_test, y_test) = found["train"], found["test"]
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    targets = np.eye(len(labels))[y]
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (targets - targets.mean(0)))
    return float(((x_test @ weights + targets.mean(0)).argmax(1) == y_test).mean())
