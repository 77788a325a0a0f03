"""Measure the Frechet distance of samples to Fashion-MNIST, in the features of a small classifier.

    python sample.py --onnx page/fashion-mnist.onnx -n 1000 --steps 10 --dir samples
    python benchmarks/frechet.py samples --data fashion-mnist

--data has two folders of images, train and test, with a sub-folder for each class or with the class
in each name: 00000_9_boot.png is of class 9. The classifier trains for some minutes the first time,
and is then kept in that folder. FID is the same distance in the features of the Inception network,
which was trained on photographs.

If the samples are in sub-folders named after the classes, as sample.py --dir writes them, the
program also prints what share of them, and of the test images, the classifier recognises.

Compare only distances of equally many samples, measured with the same classifier: it is seeded, but
rounding makes it differ from one processor to another.
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

from images import from_pixels
from support.data import class_names, class_of, image_files, labels_of, read_folder

SIZE = 32


class Classifier(nn.Module):
    """Up to ten classes from 128 features of grey 32x32 images, (B, 1, 32, 32)."""

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
    return model.eval()


def statistics(model, images):
    """Return the mean (128,) and the covariance (128, 128) of the features, in float64."""
    with torch.no_grad():
        parts = [model.features(from_pixels(part)) for part in images.split(500)]
    features = torch.cat(parts).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def share_recognised(model, images, labels):
    """Return the share of the images to which the classifier gives their labels, int64 (N,)."""
    with torch.no_grad():
        found = torch.cat([model(from_pixels(part)).argmax(1) for part in images.split(500)])
    return (found == torch.as_tensor(labels)).float().mean().item()


def frechet_distance(first, second):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two pairs of mean m and covariance S.

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2, which are real and
    not negative up to rounding.
    """
    (m1, S1), (m2, S2) = first, second
    roots = np.sqrt(np.linalg.eigvals(S1 @ S2).real.clip(0))
    return ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * roots.sum()


def read(folder):
    """Return the images of a folder as grey 32x32, cut as train.py cuts them."""
    return torch.from_numpy(read_folder(folder, SIZE, 1)[0])


def labels_and_names(folder):
    """Return the labels of the images in a folder, int64 (N,), and the name of each label.

    The class of an image is its sub-folder or, without sub-folders, a part of its name.
    """
    paths = image_files(folder)[0]
    if class_of(paths[0], folder):
        names = class_names(folder)
        return torch.from_numpy(labels_of(paths, folder, names)), names
    words = [Path(path).stem.split("_") for path in paths]
    names = {int(label): name for _, label, name in words}
    return torch.tensor([int(label) for _, label, _ in words]), [names[k] for k in sorted(names)]


def reference(data):
    """Return the classifier, and its statistics of the test set and of 1,000 training images."""
    kept = data / f"frechet-{SIZE}.pt"
    if not kept.exists():
        images, (labels, _) = read(data / "train"), labels_and_names(data / "train")
        model = train_classifier(images, labels)
        some = images[
            torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000]
        ]
        pairs = [statistics(model, read(data / "test")), statistics(model, some)]
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in pairs]
        torch.save({"model": model.state_dict(), "test": pairs[0], "train": pairs[1]}, kept)
    state, model = torch.load(kept, weights_only=True), Classifier().eval()
    model.load_state_dict(state["model"])
    test, train = ([part.numpy() for part in state[name]] for name in ("test", "train"))
    return model, test, train


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="+", help="folders of samples")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and test")
    args = parser.parse_args()
    model, test, train = reference(args.data)
    print(f"1,000 training images: {frechet_distance(train, test):.2f}")
    test_labels, names = labels_and_names(args.data / "test")
    real = None  # the share of the test images, measured once, if it is needed
    for folder in args.samples:
        has_classes = {class_of(path, folder) for path in image_files(folder)[0]} <= {*names}
        images, labels = read_folder(folder, SIZE, 1, classes=names if has_classes else None)
        images = torch.from_numpy(images)
        distance = frechet_distance(statistics(model, images), test)
        print(f"{folder}, {len(images):,} samples: {distance:.2f}", flush=True)
        if has_classes:
            share = share_recognised(model, images, labels)
            if real is None:
                real = share_recognised(model, read(args.data / "test"), test_labels)
            print(f"  {share:.1%} recognised, and {real:.1%} of the test images", flush=True)


if __name__ == "__main__":
    main()
