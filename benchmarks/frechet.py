"""Measure the Frechet distance of samples to Fashion-MNIST, in the features of a small classifier.

    python sample.py --onnx page/fashion-mnist.onnx -n 1000 --steps 10 --dir samples
    python benchmarks/frechet.py samples

The classifier and the statistics of the test set are in benchmarks/ruler.npz, so that the same
images have the same distance on every machine. Compare only sets of equal size. The FID is the
same distance in the features of the Inception network, which was trained on photographs.

If the samples are in sub-folders named after the classes, as sample.py --dir writes them, the
program also prints, for them and for the test images, what share the classifier recognises, and
their variety: the variance of the features within a class, summed over the features.

    python benchmarks/frechet.py samples --data mine

measures the distance to other images, with a classifier that is trained on them, so this distance
cannot be compared with the distance to any other data set. --data has two folders, train and test,
with a sub-folder of images for each of at most ten classes, and ten training images or more of
each. The first time, the classifier trains for a few minutes, and is then kept in the --data folder
as ruler.npz.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from images import from_pixels, read_folder, replacing

RULER = Path(__file__).with_name("ruler.npz")
SIZE, SETS = 32, 10  # SETS: how many sets of real images are compared with the test set


class Classifier(nn.Module):
    """Up to ten classes from 128 features of greyscale images, (B, 1, 32, 32)."""

    def __init__(self):
        super().__init__()
        layers, widths = [], (1, 32, 64, 128, 128)
        for k, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, stride=2 if k else 1, padding=1), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.features(x))


def train_classifier(images, labels):
    """Return a Classifier after three epochs. images: uint8 (N, 1, 32, 32). labels: int64 (N,)."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters())
    for rate in (2e-3, 1e-3, 3e-4):
        optimizer.param_groups[0]["lr"] = rate
        for index in tqdm(torch.randperm(len(images)).split(128), "classifier", mininterval=1):
            optimizer.zero_grad()
            F.cross_entropy(model(from_pixels(images[index])), labels[index]).backward()
            optimizer.step()
    return model.half().float()  # as in the file


@torch.no_grad()
def features_of(model, images):
    """Return the features of images, uint8 (N, 1, 32, 32), as float64 (N, 128)."""
    parts = [model.features(from_pixels(part)) for part in images.split(500)]
    return torch.cat(parts).double().numpy()


def statistics(features):
    """Return the mean (128,) and the covariance (128, 128) of features, (N, 128)."""
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(first, second):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two pairs of mean m and covariance S.

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2, which are real and
    not negative up to rounding.
    """
    (m1, S1), (m2, S2) = first, second
    roots = np.sqrt(np.linalg.eigvals(S1 @ S2).real.clip(0))
    return ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * roots.sum()


def variety(features, labels):
    """Return the variance within a class of features, (N, 128), summed over the features.

    It is the mean over the classes with two images or more. labels: int64 (N,).
    """
    classes = [features[labels == k] for k in np.unique(labels)]
    return np.mean([x.var(0, ddof=1).sum() for x in classes if len(x) > 1]).item()


class Ruler:
    """The classifier and the statistics of the test set in a ruler.npz.

    Attributes: names, the names of the classes; recognised and variety, of the test images; real,
    {a kind of set of training images: the distances of SETS such sets}.
    """

    def __init__(self, path=RULER):
        file, self.model = dict(np.load(path)), Classifier().eval()
        weights = {name: torch.from_numpy(file.pop(name)) for name in self.model.state_dict()}
        self.model.load_state_dict(weights)  # float16, copied to float32
        self.test = file.pop("mean").astype(float), file.pop("covariance").astype(float)
        self.names, self.recognised = file.pop("names").tolist(), file.pop("recognised").item()
        self.variety = file.pop("variety").item()
        self.real = file

    def distance(self, images):
        """Return the distance between images, uint8 (N, 1, 32, 32), and the test set."""
        return frechet_distance(statistics(features_of(self.model, images)), self.test)


@torch.no_grad()
def share_recognised(model, images, labels):
    """Return the share of images that a Classifier recognises as their labels, int64 (N,)."""
    found = torch.cat([model(from_pixels(part)).argmax(1) for part in images.split(500)])
    return (found == labels).float().mean().item()


def read(folder, **classes):
    """Return images in greyscale, uint8 (N, 1, 32, 32), and labels and names as read_folder does.

    classes: the arguments classes and names of read_folder. The labels are a tensor, int64 (N,).
    Exits if there are fewer than two images.
    """
    images, labels, names = read_folder(folder, SIZE, 1, **classes)
    if len(images) < 2:
        sys.exit(f"{folder} needs two images or more, because one has no covariance")
    return torch.from_numpy(images), None if labels is None else torch.from_numpy(labels), names


def make_ruler(data, path):
    """Train a classifier on data / "train", and save it with the statistics of data / "test"."""
    images, labels, names = read(data / "train", classes=True)
    if len(names) > 10 or labels.bincount().min() < SETS:
        sys.exit(f"{data}/train must have at most ten classes, and {SETS} images or more of each")
    test, test_labels, _ = read(data / "test", names=names)
    model = train_classifier(images, labels)
    of_test, features = features_of(model, test), features_of(model, images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    ranks = torch.stack([(labels[order] == k).cumsum(0) for k in range(len(names))], 1)
    ranks = ranks.gather(1, labels[order, None])[:, 0] - 1  # earlier images of the class
    file = {name: weight.half().numpy() for name, weight in model.state_dict().items()}
    file |= {"names": names, "recognised": share_recognised(model, test, test_labels)}
    file["variety"], of_test = variety(of_test, test_labels), statistics(of_test)
    file |= {"mean": np.float32(of_test[0]), "covariance": np.float32(of_test[1])}
    for count in [n for n in (1000, 5000) if SETS * n <= len(images)] or [len(images) // SETS]:
        each = max(1, min(count // len(names), labels.bincount().min().item() // SETS))
        sets = {f"{count:,}": torch.arange(len(images)) // count,
                f"{each:,} of each class": ranks // each}  # fmt: skip
        for name, number in sets.items():
            chosen = (features[order[number == k]] for k in range(SETS))
            file[name] = [frechet_distance(statistics(part), of_test) for part in chosen]
    with replacing(path) as out:
        np.savez_compressed(out, **file)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="+", help="folders of samples")
    parser.add_argument("--data", type=Path, help="a folder with train and test [Fashion-MNIST]")
    args = parser.parse_args()
    path = args.data / "ruler.npz" if args.data else RULER
    if args.data and path.exists():
        print(f"using the ruler {path}; if the images have changed since it was made, remove it")
    elif args.data:
        make_ruler(args.data, path)
    ruler = Ruler(path)
    for name, values in ruler.real.items():
        print(f"training images, {name}: {values.mean():.2f} +- {values.std(ddof=1):.2f}")
    for folder in args.samples:
        has_classes = any((folder / name).is_dir() for name in ruler.names)
        images, labels, _ = read(folder, names=ruler.names if has_classes else None)
        print(f"{folder}, {len(images):,} samples: {ruler.distance(images):.2f}", flush=True)
        if has_classes:
            share = share_recognised(ruler.model, images, labels)
            print(f"  {share:.1%} recognised, and {ruler.recognised:.1%} of the test images")
            found = variety(features_of(ruler.model, images), labels)
            print(f"  variety {found:.0f}, and {ruler.variety:.0f} of the test images")


if __name__ == "__main__":
    main()
