"""A classifier of real images judges made ones."""

import torch

from mergevq.metrics.judge import fit_judge, grey_pixels


def stripes(label):
    """Images whose left or right half is bright."""
    image = torch.full((len(label), 3, 32, 32), -1.0)
    for one, right in zip(image, label.tolist(), strict=True):
        one[:, :, 16 * right : 16 * right + 16] = 1
    return image


def test_a_pixel_of_a_row_is_the_mean_of_its_area_and_of_the_colours():
    image = torch.zeros(1, 3, 16, 16)
    image[0, 0, :2, 2:4] = 3.0
    rows = grey_pixels(image)
    assert rows.shape == (1, 64)
    assert rows[0, 1] == 1
    assert rows.sum() == 1


def test_it_knows_classes_that_it_was_fitted_to_in_any_batches():
    label = torch.tensor([0, 1, 0, 1, 1, 0])
    batches = [(stripes(label[:4]), label[:4]), (stripes(label[4:]), label[4:])]
    judge = fit_judge(batches)
    assert judge.accuracy(stripes(label), label) == 1
    assert judge.accuracy(stripes(1 - label), label) == 0
    half = torch.tensor([0, 0, 0, 0, 1, 1])
    assert judge.accuracy(stripes(label), half) == 0.5


def test_features_of_another_kind_are_compared_instead():
    label = torch.tensor([0, 1, 0, 1])
    # The mean over an image is the same for both halves, so nothing can be told.
    judge = fit_judge([(stripes(label), label)], lambda image: image.mean((1, 2, 3))[:, None])
    assert judge.accuracy(stripes(label), label) == 0.5


def test_features_are_computed_of_few_images_at_once():
    label = torch.arange(150) % 2
    seen = []

    def features(image):
        seen.append(len(image))
        return grey_pixels(image)

    judge = fit_judge([(stripes(label), label)], features)
    assert judge.accuracy(stripes(label), label) == 1
    assert seen == [64, 64, 22] * 2
