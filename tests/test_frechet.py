"""benchmarks/frechet.py against another form of the distance, and with speedrun.py on stripes."""

import re

import numpy as np
import pytest
from conftest import HERE, python
from PIL import Image

from benchmarks import frechet


def test_distance_is_that_of_gaussians():
    """The root by another way: tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2)."""
    random = np.random.default_rng(1)
    S1, S2 = (a @ a.T for a in random.standard_normal((2, 5, 5)))
    m1, m2 = random.standard_normal((2, 5))
    values, vectors = np.linalg.eigh(S1)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root)).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * trace
    assert np.isclose(frechet.frechet_distance((m1, S1), (m2, S2)), expected, rtol=1e-9)
    assert abs(frechet.frechet_distance((m1, S1), (m1, S1))) < 1e-9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of ten classes of stripes, and a folder of other stripes and one of noise."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("frechet")

    def save(folder, images):
        (root / folder).mkdir(parents=True)
        for k, (label, pixels) in enumerate(images):
            Image.fromarray(pixels).save(root / folder / f"{k:05d}_{label}_x.png")

    def stripes(count):
        for k in range(count):
            wave = np.sin(np.arange(28) * (k % 10 + 1) / 3 + random.uniform(0, 6))
            yield k % 10, np.tile((wave * 100 + 128).astype(np.uint8), (28, 1))

    save("data/train", stripes(400))
    save("data/test", stripes(200))
    save("same", stripes(200))
    save("noise", ((0, random.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(200)))
    return root


def test_program_ranks_noise_behind_images(data, monkeypatch, capsys):
    """Other stripes are near, noise is far, and the classifier is trained only once."""
    words = ["same", "noise", "--data", "data"]
    said = python(HERE / "benchmarks" / "frechet.py", *words, cwd=data)
    real, same, other = map(float, re.findall(r": ([\d.]+)$", said, re.M))
    assert max(real, same) < 1 < other and "classifier" in said
    monkeypatch.chdir(data)
    monkeypatch.setattr("sys.argv", ["frechet.py", *words])
    frechet.main()
    again = capsys.readouterr()
    assert again.out in said and "classifier" not in again.err


@pytest.mark.slow
def test_speedrun_prints_a_row(data):
    """Of a tiny network, whose samples are noise."""
    small = "--base-channels 8 --channel-mults 1 1 --attention-resolutions --steps 9 --batch 8"
    words = ["--data", "data", "--samples", 100, *small.split()]
    said = python(HERE / "benchmarks" / "speedrun.py", *words, cwd=data, timeout=600)
    head, row = (line.strip("| ").split(" | ") for line in said.splitlines()[-2:])
    assert len(head) == len(row) == 10
    assert row[2] == "9" and min(float(row[1]), float(row[3]), float(row[4])) > 1
