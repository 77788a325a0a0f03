"""The network that minimises the loss (14) on a finite training set, in closed form.

    network = exact_network(diffusion, x0)    # E[eps | x_t], in place of a UNet
    diffusion.sample(network, (16, 3, 8, 8))  # returns images of x0

It needs no training, and separates the errors of a trained network from properties of the method.
"""

import torch


def exact_network(diffusion, x0, labels=None, std=0.0):
    """Return E[eps | x_t] as a function of (x_t, t), if the data are x0, all equally probable.

    Given x_t, image k has a probability proportional to q(x_t | x0[k]), so the mean of x_0 is the
    average of the images, weighted by a softmax. The function is called like a UNet that
    predicts eps, also with y.

    x0: (N, C, H, W), on the CPU or CUDA, because small t need float64.
    labels: the classes of x0, int64 (N,), if y will be given. A y that is larger than all of them
        means "no class".
    std: the standard deviation around each x0, if the data are a mixture of Gaussians.
    """
    data = x0.flatten(1).double()
    squares = data.square().sum(1)
    alphas_bar = diffusion.alphas_bar.to(x0.device)

    def network(x_t, t, y=None):
        x, abar = x_t.flatten(1).double(), alphas_bar[t, None]
        variance = abar * std**2 + 1 - abar  # of x_t around sqrt(abar) x0[k]
        logits = (abar.sqrt() * (x @ data.T) - abar * squares / 2) / variance
        if y is not None:
            others = (labels != y[:, None]) & (y[:, None] <= labels.max())
            logits = logits.masked_fill(others, -torch.inf)
        mean = logits.softmax(1) @ data
        eps = (1 - abar).sqrt() / variance * (x - abar.sqrt() * mean)
        return eps.view_as(x_t).float()

    return network


@torch.no_grad()
def mean_squared_error(diffusion, network, x0, t, seed=0):
    """Return the mean squared error of eps for each image of x0 (N, C, H, W) at t (N,): (N,).

    network(x_t, t) returns eps. The noise depends only on the seed and N.
    """
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0.device)
    parts = zip(x0.split(256), t.split(256), noise.split(256), strict=True)  # memory
    errors = [diffusion.squared_error(network, *part).flatten(1).mean(1) for part in parts]
    return torch.cat(errors)
