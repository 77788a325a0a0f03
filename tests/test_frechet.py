"""benchmarks/frechet.py against another form of the distance, its ruler, and ladder.py."""

import csv
import re

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image

from benchmarks import frechet, ladder


def test_distance_is_that_of_gaussians():
    """Compute the root in another way: tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2)."""
    random = np.random.default_rng(1)
    S1, S2 = (a @ a.T for a in random.standard_normal((2, 5, 5)))
    m1, m2 = random.standard_normal((2, 5))
    values, vectors = np.linalg.eigh(S1)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root)).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * trace
    assert np.isclose(frechet.frechet_distance((m1, S1), (m2, S2)), expected, rtol=1e-9)
    assert abs(frechet.frechet_distance((m1, S1), (m1, S1))) < 1e-9


def test_variety_is_the_variance_within_a_class():
    """Classes far apart, of variances 1 and 9 in each of four features; one image has none."""
    z = np.random.default_rng(2).standard_normal((40_000, 4))
    labels = np.arange(40_000) % 2
    features = np.concatenate([z * (1 + 2 * labels)[:, None] + 100 * labels[:, None], z[:1]])
    assert frechet.variety(features, np.append(labels, 2)) == pytest.approx(4 * 5, rel=0.02)


def stripes(count, seed=0):
    """Yield (class, pixels) of images of ten classes of stripes, uint8 (28, 28)."""
    random = np.random.default_rng(seed)
    for k in range(count):
        wave = np.sin(np.arange(28) * (k % 10 + 1) / 3 + random.uniform(0, 6))
        yield k % 10, np.tile((wave * 100 + 128).astype(np.uint8), (28, 1))


def test_included_ruler_measures_the_same_everywhere():
    """Three digits agree: in one thread, in two, in float64, and where it was measured."""
    images = torch.from_numpy(np.stack([pixels for _, pixels in stripes(200)]))
    images = torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None]
    ruler, found, threads = frechet.Ruler(), [], torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(ruler.distance(images))
    torch.set_num_threads(threads)
    x = images / 127.5 - 1
    features = ruler.model.double().features(x.double()).detach().numpy()
    found.append(frechet.frechet_distance(frechet.statistics(features), ruler.test))
    assert found == pytest.approx([691.53] * 3, rel=5e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Make a data set of ten classes of stripes, a folder of other stripes, and one of noise."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("frechet")

    def save(folder, images):
        for k, (label, pixels) in enumerate(images):
            path = root / folder / f"class{label}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)

    save("data/train", [item for k, item in enumerate(stripes(800)) if item[0] > 0 or k < 400])
    save("data/test", stripes(200, 1))
    save("same", stripes(200, 2))
    noise = random.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    save("noise", ((k % 10, pixels) for k, pixels in enumerate(noise)))
    return root


def test_program_ranks_noise_behind_images(data, program):
    """Other stripes are near and recognised, noise is neither; the classifier is trained once."""
    command = "benchmarks/frechet.py", "same", "noise", "--data", "data"
    said = program(*command, cwd=data)
    real = [*map(float, re.findall(r"(?:^|\r)training images, .*: ([\d.]+) \+-", said, re.M))]
    same, other = map(float, re.findall(r" 200 samples: ([\d.]+)$", said, re.M))
    assert "images, 4 of each class: " in said  # ten sets: the smallest class has 40 images
    assert len(real) == 2 and max(*real, same) < other / 10 and "classifier" in said
    same, noise = map(float, re.findall(r"^  ([\d.]+)% recognised", said, re.M))
    assert same > 2 * noise
    same, _ = re.findall(r"^  variety (\d+), and (\d+) of the test images", said, re.M)
    assert float(same[0]) == pytest.approx(float(same[1]), rel=0.3)
    again = program(*command, cwd=data)
    assert "classifier" not in again and again.splitlines()[-6:] == said.splitlines()[-6:]


def test_mistakes_are_one_line(program, tmp_path):
    """Eleven classes, too few images of a class, and one sample; none of them trains anything."""
    images = {"many": range(11 * 10), "few": [0, 1, 10, 11], "one": [0]}
    for name, numbers in images.items():
        for k in numbers:
            path = tmp_path / name / "train" / f"{k // 10}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), k).save(path)
    must = "train must have at most ten classes, and 10 images or more of each"
    for words, said in (
        (["--data", "many"], must), (["--data", "few"], must), ([], "one needs two images or more"),
    ):  # fmt: skip
        assert said in program("benchmarks/frechet.py", "one", *words, cwd=tmp_path, code=1)


def test_tables_of_the_ladder_are_those_of_its_rows():
    rows, included = ladder.read_rows(ladder.HERE / "ladder.csv"), ladder.INCLUDED
    tables = {
        "benchmarks/ladder.md": [
            ladder.gains(rows),
            ladder.few_steps(rows),
            ladder.sizes(rows),
            ladder.samplers(rows, "paper.onnx"),
        ],
        "docs/beyond.md": [ladder.samplers(rows, included), ladder.guidance(rows, included)],
    }
    for name, its_tables in tables.items():
        for table in its_tables:
            assert f"{table}\n\n" in (HERE / name).read_text("utf-8"), table


def test_change_has_the_interval_of_a_t_test():
    """Two arms: the logarithms have Student's distribution with the pooled variance."""
    for degrees, quantile in {3: 3.1824, 4: 2.7764, 8: 2.3060, 30: 2.0423}.items():
        assert ladder.student(degrees) == pytest.approx(quantile, rel=0.01)
    common = ladder.USUAL | ladder.FEW | {"data": "fashion-mnist", "samples": "5000"}
    rows = [
        common
        | {"rung": arm, "steps": str(ladder.steps_of(arm)), "distance": distance, "seed": distance}
        | {"recognised": "0.5"}
        for arm, distances in {"quick": ("20", "24", "30"), "without-v": ("10", "11", "12")}.items()
        for distance in distances
    ]
    before, after = np.log([20, 24, 30]), np.log([10, 11, 12])
    error = np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / 2 * (2 / 3))
    ends = 100 * np.expm1(after.mean() - before.mean() + np.array([0, -1, 1]) * 2.7764 * error)
    line = ladder.gains(rows).splitlines()[3]
    assert "| 3 | 11.0 | {:+.0f}% ({:+.0f} to {:+.0f}) |".format(*ends) in line


@pytest.mark.slow
def test_ladder_measures_an_arm_once(data, program, monkeypatch):
    """The network is untrained, and its samples are noise."""
    monkeypatch.setattr(ladder, "steps_of", lambda arm: 3)
    program("benchmarks/frechet.py", "same", "--data", "data", cwd=data)  # makes their ruler
    words = ["without-v", "--data", "data", "--table", "ladder.csv", "--samples", 60]
    for _ in range(2):
        program("benchmarks/ladder.py", *words, "--sampling-steps", 2, cwd=data)
    (row,) = csv.DictReader((data / "ladder.csv").read_text().splitlines())
    assert float(row["distance"]) > 10 and row["steps"] == "3"
