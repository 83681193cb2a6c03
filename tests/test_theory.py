"""Theorem 4.1 and proposition D.1 of the paper: the variance of gradients, in closed form and by Monte Carlo.

The sparse coding model: x = e_y + eps with y in {0, 1} and eps ~ N(0, s I) in d dimensions; the linear model
W x at W = I; batches of two examples. Var(G) = E||G - E G||^2.

The closed forms are derived from the definitions of the losses, with infinitely many examples, so that the
two of a batch are independent. The appendix slips in eq. 18 and 41, which drop E[eps eps^T] = s I and all
that follows from it; what remains it compares element by element, by the number of terms. With all moments
the theorem holds, for every dimension d >= 2 and every noise level s >= 0: see test_theorem_4_1.
"""

import math

import pytest
import torch

DIMENSIONS, NOISES = (2, 5, 20), (0.0, 0.01, 0.1, 1.0)


def sl_loss(w, x, classes):
    """The supervised MSE loss of theorem 4.1: mean over the batch of ||W x_i - e_{y_i}||^2; x (2, d)."""
    return (x @ w.T - torch.eye(x.shape[1], dtype=x.dtype)[classes]).square().sum(1).mean()


def ssl_loss(w, x):
    """The spectral contrastive loss of theorem 4.1 on x (2, d), its expectation over augmentations taken.

    The two augmentations of an example add independent noise of mean 0, so E f(x_1)^T f(x_2) = ||W x||^2; the
    second expectation is over independent i and j of the batch, i = j included.
    """
    z = x @ w.T
    return -2 * z.square().sum(1).mean() + (z @ z.T).square().mean()


def sl_gradient(x, classes):
    """(B, d, d): sum over the two examples of (x - e_y) x^T, for x (B, 2, d)."""
    centres = torch.eye(x.shape[2], dtype=x.dtype)[classes]
    return (x - centres).transpose(1, 2) @ x


def ssl_gradient(x):
    """(B, d, d): -4 M + 4 M^2 with M = (x_1 x_1^T + x_2 x_2^T) / 2, for x (B, 2, d)."""
    m = x.transpose(1, 2) @ x / 2
    return 4 * (m @ m - m)


def sl_variance(d, s):
    """Two independent examples, each E||eps (e + eps)^T||^2 - ||s I||^2 = s d + s^2 (d^2 + 2 d) - s^2 d."""
    return 2 * d * s + 2 * d * (d + 1) * s**2


def ssl_variance(d, s):
    """16 (E tr(M^4 - 2 M^3 + M^2) - ||E[M^2 - M]||^2): Gaussian moments, over the four pairs of classes."""
    return (
        1 / 2 + 2 * (d + 6) * s + 2 * (17 * d + 162) * s**2 + 8 * (9 * d**2 + 59 * d + 76) * s**3
        + 2 * d * (d + 4) * (d**2 + 12 * d + 19) * s**4
    )  # fmt: skip


def ssl_mean(d, s):
    """E[-4 M + 4 M^2], (d, d): a multiple of I, and another more on e_0 and e_1."""
    on_all = (s * (d * s + 1) + 3 * s**2) / 2 - s
    same = ((d * s + 1) + 4 * s + 1 + 2 * s) / 2 - 1  # of e_y e_y^T when both are of class y
    different = ((d * s + 1) + 4 * s + 2 * s) / 4 - 1 / 2  # of both when they are not
    mean = on_all * torch.eye(d, dtype=torch.float64)
    mean[0, 0] += same / 4 + different / 2
    mean[1, 1] += same / 4 + different / 2
    return 4 * mean


def draw(batches, d, s, generator):
    """x (batches, 2, d) and classes (batches, 2)."""
    classes = torch.randint(2, (batches, 2), generator=generator)
    noise = torch.randn(batches, 2, d, dtype=torch.float64, generator=generator) * math.sqrt(s)
    return torch.eye(d, dtype=torch.float64)[classes] + noise, classes


@pytest.mark.parametrize("d", DIMENSIONS)
def test_gradients_are_those_of_the_losses(d):
    x, classes = draw(4, d, 0.3, torch.Generator().manual_seed(0))
    for i in range(len(x)):
        w = torch.eye(d, dtype=torch.float64, requires_grad=True)
        (sl,) = torch.autograd.grad(sl_loss(w, x[i], classes[i]), w)
        (ssl,) = torch.autograd.grad(ssl_loss(w, x[i]), w)
        torch.testing.assert_close(sl_gradient(x[i : i + 1], classes[i : i + 1])[0], sl)
        torch.testing.assert_close(ssl_gradient(x[i : i + 1])[0], ssl)


def test_expectation_over_augmentations():
    """E f(x_1)^T f(x_2) over two augmentations of x is ||W x||^2, within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    x = torch.randn(4, dtype=torch.float64, generator=generator)
    views = x + torch.randn(2, 100_000, 4, dtype=torch.float64, generator=generator)
    products = ((views[0] @ w.T) * (views[1] @ w.T)).sum(1)
    error = products.std() / math.sqrt(len(products))
    assert abs(products.mean() - (w @ x).square().sum()) < 5 * error


@pytest.mark.parametrize("s", NOISES)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_closed_forms_by_monte_carlo(d, s):
    """Means and variances of both gradients, each within five standard errors of 20,000 batches."""
    x, classes = draw(20_000, d, s, torch.Generator().manual_seed(1))
    sl_mean = 2 * s * torch.eye(d, dtype=torch.float64)  # the appendix has 0
    cases = [(sl_gradient(x, classes), sl_mean, sl_variance(d, s))]
    cases += [(ssl_gradient(x), ssl_mean(d, s), ssl_variance(d, s))]
    for gradients, mean, variance in cases:
        direction = mean + torch.diag(torch.arange(d, dtype=torch.float64))  # one number of the mean
        along = (gradients * direction).sum((1, 2))
        error = along.std() / math.sqrt(len(along))
        assert abs(along.mean() - (mean * direction).sum()) <= 5 * error + 1e-12
        squares = (gradients - mean).square().sum((1, 2))
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - variance) <= 5 * error + 1e-12


def test_theorem_4_1():
    """Var(SL) < Var(SSL): the difference is a square and a sum of terms that are not negative, one above 0.

    2 (d^2 s^2 - 1/2)^2 + 12 s + (324 + 32 d) s^2 + 8 (9 d^2 + 59 d + 76) s^3
    + (32 d^3 + 134 d^2 + 152 d) s^4, which is 1/2 at s = 0. In high dimensions it is a close thing: at s =
    1 / (sqrt(2) d) the ratio tends to 1.
    """
    for d in (2, 3, 5, 10, 100, 10_000):
        for s in (0.0, 1e-6, 1e-4, 1e-2, 0.1, 1 / (math.sqrt(2) * d), 1.0, 10.0):
            rest = 12 * s + (324 + 32 * d) * s**2 + 8 * (9 * d**2 + 59 * d + 76) * s**3
            rest += (32 * d**3 + 134 * d**2 + 152 * d) * s**4
            difference = 2 * (d**2 * s**2 - 1 / 2) ** 2 + rest
            assert difference > 0 and sl_variance(d, s) < ssl_variance(d, s)
            assert ssl_variance(d, s) - sl_variance(d, s) == pytest.approx(difference, rel=1e-6)
    assert sl_variance(10, 0.0) == 0 and ssl_variance(10, 0.0) == 1 / 2
    s = 1 / (math.sqrt(2) * 10_000)
    assert 1 < ssl_variance(10_000, s) / sl_variance(10_000, s) < 1.01


# -- proposition D.1: one epoch of synchronous parallel SGD --------------------------------------------------


def after_an_epoch(theta, x, classes, batches, loss, lr=0.01):
    """theta - lr x the sum of the gradients of all batches of the partition, (K, d)."""
    theta = theta.clone().requires_grad_()
    total = sum(loss(theta, x[batch], classes[batch]) for batch in batches)
    return theta.detach() - lr * torch.autograd.grad(total, theta)[0]


LOSSES = {
    "mse": lambda w, x, y: (x @ w.T - torch.eye(len(w), dtype=x.dtype)[y]).square().sum(1).mean(),
    "cross_entropy": lambda w, x, y: torch.nn.functional.cross_entropy(x @ w.T, y),
    "spectral": lambda w, x, y: ssl_loss(w, x),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_proposition_d_1(loss):
    """Variance over random partitions: 0 for supervised losses, above 0 for the contrastive one."""
    generator = torch.Generator().manual_seed(0)
    num_classes, d, n, size = 4, 10, 64, 16
    classes = torch.arange(n) % num_classes
    x = torch.eye(d, dtype=torch.float64)[classes]
    x = x + torch.randn(n, d, dtype=torch.float64, generator=generator)
    theta = torch.randn(num_classes, d, dtype=torch.float64, generator=generator)
    ends = []
    for _ in range(10):
        batches = torch.randperm(n, generator=generator).split(size)
        ends.append(after_an_epoch(theta, x, classes, batches, LOSSES[loss]))
    variance = torch.stack(ends).var(0, correction=0).sum().item()
    travelled = (ends[0] - theta).square().sum().item()
    if loss == "spectral":
        assert variance > 1e-6 * travelled
    else:
        assert variance < 1e-24 * travelled


def test_the_two_partitions_of_proposition_d_1():
    """Without noise: batches across the classes against batches of one class each.

    The appendix gives M = I for the first; it is I / K, on the K coordinates of the classes. The gradients,
    -4 theta M + 4 theta M theta^T theta M summed over the batches, differ all the same.
    """
    num_classes, d, per_class = 4, 6, 4
    classes = torch.arange(num_classes).repeat_interleave(per_class)
    x = torch.eye(d, dtype=torch.float64)[classes]
    across = torch.arange(len(x)).view(num_classes, per_class).T  # each batch has every class once
    within = torch.arange(len(x)).view(num_classes, per_class)
    m = [x[batch].T @ x[batch] / len(batch) for batch in across]
    expected = torch.zeros(d, d, dtype=torch.float64)
    expected[:num_classes, :num_classes] = torch.eye(num_classes) / num_classes
    assert all(torch.equal(m_b, expected) for m_b in m)
    theta = torch.randn(num_classes, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = [after_an_epoch(theta, x, classes, batches, LOSSES["spectral"]) for batches in (across, within)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3
