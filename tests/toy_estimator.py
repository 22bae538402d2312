"""An estimator from outside the package, as docs/how-to/estimators.md has it: the score function, scaled.

It is `score` with the advantages f - b divided by their standard deviation over the batch, as policy gradients for
discrete actions often do; which is biased, since each sample is in the number that it is divided by.
"""

import torch

from fastsac.estimators import Entry, register
from fastsac.types import Estimate


def normalized(mean, log_std, draw, q_function, alpha, baseline):
    with torch.no_grad():  # the sample is fixed
        action, log_prob = draw.sample(mean, log_std)  # [K, B, A], [K, B]
        q = q_function(action)  # [K, E, B]
        f = alpha * log_prob - q.amin(1)
        advantage = (f - f.mean()) / (f.std() + 1e-6)
        u = mean + log_std.exp() * draw.noise(mean)
    log_normal = torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum(-1)
    return Estimate((log_normal * advantage).mean(), log_prob, q)


register("normalized", Entry(normalized, least_samples=2))
