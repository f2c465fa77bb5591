"""The frameworks' own optimisers diverge where `theory.stability_limit` says, on real data.

Least squares on the digits has a constant Hessian.  Along its steepest direction the gradient grows
exactly when learning rate × largest eigenvalue is above the method's limit.
"""

import numpy as np
import pytest

from gradlab import data, theory

STEPS = 160
SETTINGS = [("gradient descent", 0.0)] + [
    (method, beta) for method in ("momentum", "nesterov", "adam") for beta in (0.5, 0.9)
]
HUGE = 1e30
"""Adam's ε, so large that its denominators stand still; the learning rate is in units of it."""


@pytest.fixture(scope="module")
def problem():
    """(inputs, targets, start, steepest direction, its curvature), float64."""
    digits = data.digits(n_train=200)
    x, t = digits.x_train.astype(float), np.eye(10)[digits.y_train]
    curvatures, directions = np.linalg.eigh(x.T @ x / len(x))
    start = np.random.default_rng(0).normal(size=(64, 10))
    small = 1e-20  # so that a diverging gradient stays far below Adam's ε
    return x, small * t, small * start, directions[:, -1], curvatures[-1]


def still_grows(along):
    """Whether a component grows once the start is forgotten (rounding errors do not count)."""
    return along[-10:].max() > max(along[80:90].max(), 1e-6 * along[0])


def torch_grows(method, beta, lr, problem):
    torch = pytest.importorskip("torch")
    x, t, start, direction, _ = problem
    x, t = torch.tensor(x), torch.tensor(t)
    w = torch.nn.Parameter(torch.tensor(start))
    if method == "adam":
        rule = torch.optim.Adam([w], lr=HUGE * lr, betas=(beta, 0.9), eps=HUGE)
    else:
        rule = torch.optim.SGD([w], lr=lr, momentum=beta, nesterov=method == "nesterov")
    along = []
    for _ in range(STEPS):
        rule.zero_grad()
        ((x @ w - t).square().sum() / (2 * len(x))).backward()
        along.append(np.linalg.norm(direction @ w.grad.numpy()))
        rule.step()
    return still_grows(np.array(along))


def keras_grows(method, beta, lr, problem):
    tf = pytest.importorskip("tensorflow")
    x, t, start, direction, _ = problem
    w = tf.Variable(start)
    if method == "adam":
        rule = tf.keras.optimizers.Adam(HUGE * lr, beta_1=beta, beta_2=0.9, epsilon=HUGE)
    else:
        rule = tf.keras.optimizers.SGD(lr, momentum=beta, nesterov=method == "nesterov")
    rule.build([w])

    @tf.function
    def run():
        along = tf.TensorArray(tf.float64, STEPS)
        for step in tf.range(STEPS):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(x @ w - t)) / (2 * len(x))
            gradient = tape.gradient(loss, w)
            along = along.write(step, tf.norm(tf.linalg.matvec(gradient, direction, True)))
            rule.apply([gradient], [w])
        return along.stack()

    return still_grows(run().numpy())


@pytest.mark.parametrize("grows", [torch_grows, keras_grows])
@pytest.mark.parametrize(("method", "beta"), SETTINGS)
def test_the_measured_limit_is_within_one_per_cent_of_the_predicted(grows, method, beta, problem):
    predicted = theory.stability_limit(method, beta)
    low, high = 0.9 * predicted, 1.1 * predicted  # of learning rate × largest eigenvalue
    assert not grows(method, beta, low / problem[-1], problem)
    assert grows(method, beta, high / problem[-1], problem)
    while high / low > 1.002:
        middle = np.sqrt(low * high)
        if grows(method, beta, middle / problem[-1], problem):
            high = middle
        else:
            low = middle
    assert np.sqrt(low * high) == pytest.approx(predicted, rel=0.01)


def radius(a, beta, nesterov):
    """Longest eigenvalue of one step on a parabola, at learning rate × curvature a."""
    step = [[1 - a - beta * a, -(beta**2)], [a, beta]] if nesterov else [[1 - a, -beta], [a, beta]]
    return np.abs(np.linalg.eigvals(step)).max()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize(("method", "nesterov"), [("momentum", False), ("nesterov", True)])
def test_at_the_limit_an_eigenvalue_of_the_step_has_length_one(method, nesterov, beta):
    limit = theory.stability_limit(method, beta)
    assert radius(limit, beta, nesterov) == pytest.approx(1, abs=1e-6)
    assert radius(0.999 * limit, beta, nesterov) < 1 < radius(1.001 * limit, beta, nesterov)
