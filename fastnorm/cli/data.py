"""Real images that need no network: the digits that scikit-learn ships."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Standardized images and their classes, split into a training and a test set.

    Images are (count, channels, height, width) float32, labels (count,) int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def shape(self) -> torch.Size:
        """(channels, height, width) of one image."""
        return self.train_images.shape[1:]

    def to(self, device: torch.device) -> "Images":
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def digits() -> Images:
    """1,797 handwritten digits of 8x8 pixels: 1,437 to train, 360 to test, the same for every seed.

    Each pixel is standardized by its own mean and standard deviation over the training set; nothing
    is learnt from the test set. Source: E. Alpaydin and C. Kaynak, Optical Recognition of
    Handwritten Digits, UCI, 1998.
    """
    loaded = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1),
        torch.tensor(loaded.target),
        test_size=360,
        stratify=loaded.target,
        random_state=0,
    )
    mean = train_images.mean(0)
    # Pixels are whole numbers from 0 to 16. A corner that is 0 in all images but one has a tiny
    # deviation, which would make an outlier of a single gray level: divide by one level at least.
    std = train_images.std(0, correction=0).clamp(min=1.0)
    return Images(
        (train_images - mean) / std,
        train_labels,
        (test_images - mean) / std,
        test_labels,
        classes=len(loaded.target_names),
    )


DATASETS: dict[str, Callable[[], Images]] = {"digits": digits}
