r"""The inception score: how certain a classifier is of each sample, and how varied its classes are."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.features import Features
from fewstep.metrics.intervals import Estimate, jackknife


def inception_score(
    samples: Tensor,
    classifier: str | Features = "fashion",
    *,
    level: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Estimate:
    r"""Returns the inception score of samples, from 1 to the number of classes, with an interval.

    .. math:: \exp \left( \frac{1}{n} \sum_i \mathrm{KL} \big( p(y \mid x_i) \,\|\, p(y) \big) \right),
        \qquad p(y) = \frac{1}{n} \sum_i p(y \mid x_i)

    It needs no real data, and does not see them: samples that are all certain and of all classes have the
    highest score, whatever they look like. Scores of different classifiers cannot be compared; the published
    ones are of the Inception network of ImageNet.

    Cost: one evaluation of the classifier for each sample.

    References:
        | Improved Techniques for Training GANs (Salimans et al., 2016)
        | https://arxiv.org/abs/1606.03498

    Arguments:
        samples: Images in [-1, 1], with shape (n, C, H, W), n >= 2.
        classifier: The name of an embedded extractor, or a classifier as :class:`~fewstep.metrics.Features`.
        level: The probability that the interval covers.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the blocks.

    Raises:
        ValueError: If the extractor is not a classifier, there are fewer than 2 samples, or a sample is not finite.
    """
    if len(samples) < 2:
        raise ValueError(f"the inception score needs at least 2 samples, got {len(samples)}")
    if not samples.isfinite().all():
        raise ValueError(
            "a sample is not finite; look for the sampler's first such state (fewstep analyze)"
        )
    known = Features.load(classifier) if isinstance(classifier, str) else classifier
    log_p = known.log_probabilities(samples).double()
    p = log_p.exp()
    certain = (p * log_p).nan_to_num().sum(1)

    def score(rows: Tensor, _: Tensor) -> Tensor:
        marginal = p[rows].mean(0)
        varied = -torch.special.entr(marginal).sum()
        return (certain[rows].mean() - varied).exp()[None]

    return jackknife(
        score, (len(p), 0), fixed=(False, True), level=level, blocks=blocks, seed=seed
    )[0]
