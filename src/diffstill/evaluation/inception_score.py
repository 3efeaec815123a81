"""The Inception score (Salimans et al. 2016, arXiv 1606.03498), of any classifier's logits."""

from __future__ import annotations

import math

from torch import Tensor

from .intervals import t_interval
from .results import Estimate

PARTS = 10


def inception_score(logits: Tensor, parts: int = PARTS) -> Estimate:
    """``exp(E_x KL(p(y|x) || p(y)))`` of logits (N, K): the mean over ``parts`` consecutive parts, as is usual, with
    Student's t interval over them. From 1 (all images alike, or none of a clear class) to K.

    It is called Inception score of the 2015-12-05 Inception network's 1008 logits alone; of another classifier it is
    an analogue with another scale.

    Raises:
        ValueError: fewer than 2 images.
    """
    if len(logits) < 2:
        raise ValueError(f"{len(logits)} images")
    scores = []
    for part in logits.double().tensor_split(min(parts, len(logits) // 2)):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return t_interval(scores)
