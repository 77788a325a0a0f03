"""benchmarks/frechet.py: the distance against closed forms, and the program on a small data set."""

import re

import numpy as np
import torch
from conftest import HERE, python
from PIL import Image

from benchmarks.frechet import frechet_distance


def test_distance_of_gaussians_with_the_same_axes_is_the_closed_form():
    """In the basis of the axes, it is the squared distance of the means and of the deviations."""
    random = np.random.default_rng(0)
    m1, m2, s1, s2 = random.uniform(0.5, 2, (4, 6))
    axes, _ = np.linalg.qr(random.standard_normal((6, 6)))
    pairs = [(axes @ m, axes @ np.diag(s**2) @ axes.T) for m, s in ((m1, s1), (m2, s2))]
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert np.isclose(frechet_distance(*pairs), expected, rtol=1e-9)


def test_distance_is_that_of_the_root_of_the_product():
    """The root by another way: tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2)."""
    random = np.random.default_rng(1)
    S1, S2 = (a @ a.T for a in random.standard_normal((2, 5, 5)))
    values, vectors = np.linalg.eigh(S1)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root)).sum()
    m = random.standard_normal(5)
    expected = np.trace(S1) + np.trace(S2) - 2 * trace
    assert np.isclose(frechet_distance((m, S1), (m, S2)), expected, rtol=1e-9)
    assert abs(frechet_distance((m, S1), (m, S1))) < 1e-9


def test_program_ranks_noise_behind_images(tmp_path):
    """Ten classes of stripes: other stripes are near, noise is far, and it trains only once."""
    random = np.random.default_rng(0)

    def save(folder, images):
        folder.mkdir(parents=True)
        for k, (label, pixels) in enumerate(images):
            Image.fromarray(pixels).save(folder / f"{k:05d}_{label}_x.png")

    def stripes(count):
        for k in range(count):
            wave = np.sin(np.arange(28) * (k % 10 + 1) / 3 + random.uniform(0, 6))
            yield k % 10, np.tile((wave * 100 + 128).astype(np.uint8), (28, 1))

    def noise(count):
        return ((0, random.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(count))

    for name, images in (
        ("data/train", stripes(1200)), ("data/test", stripes(300)),
        ("same", stripes(200)), ("noise", noise(200)),
    ):  # fmt: skip
        save(tmp_path / name, images)
    words = [HERE / "benchmarks" / "frechet.py", "same", "noise", "--data", "data"]
    said = [python(*words, cwd=tmp_path) for _ in range(2)]
    real, same, other = map(float, re.findall(r": ([\d.]+)$", said[0], re.M))
    assert max(real, same) < 1 < other
    assert "classifier" in said[0] and "classifier" not in said[1]
    assert torch.load(tmp_path / "data" / "frechet-32.pt", weights_only=True)
