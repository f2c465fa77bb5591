"""The same update rules in PyTorch and Keras: equal where they should be, and why not where not.

One network, its initial weights and its minibatches, float64, 200 steps.
"""

from __future__ import annotations

import numpy as np
import pytest

from gradlab import data, mlp
from gradlab.sweep import minibatches

torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")

import tensorflow as tf  # noqa: E402

import gradlab.keras as gk  # noqa: E402
import gradlab.torch as gt  # noqa: E402
from gradlab.keras.models import get_weights as keras_weights  # noqa: E402
from gradlab.torch.models import get_weights as torch_weights  # noqa: E402

SPEC = mlp.MLPSpec(64, 10, width=16, depth=2, activation="tanh")
STEPS = 200


@pytest.fixture(scope="module")
def task():
    digits = data.digits()
    return digits.x_train, digits.y_train, minibatches(len(digits.x_train), 1, STEPS, 32, 0)[:, 0]


def train_torch(make, task, schedule=None):
    """Weights after training; `make` turns parameters into an optimiser."""
    x, y, batches = task
    model = gt.MLP(SPEC, 3, torch.float64)
    optimizer = make(model.parameters())
    inputs, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(y)
    for step, rows in enumerate(batches):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = float(schedule[step])
        optimizer.zero_grad()
        logits = model(inputs[rows])
        torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    return torch_weights(model)


def train_keras(optimizer, task, schedule=None, before=None):
    """Weights after training; `before` is called with the optimiser and the step's number."""
    x, y, batches = task
    model = gk.MLP(SPEC, 3, "float64")
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def step(inputs, labels):
        with tf.GradientTape() as tape:
            logits = model(inputs)
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(each)
        optimizer.apply(tape.gradient(loss, variables), variables)

    for number, rows in enumerate(batches):
        if schedule is not None:
            optimizer.learning_rate.assign(schedule[number])
        if before is not None:
            before(optimizer, number)
        step(tf.constant(x[rows], tf.float64), y[rows])
    return keras_weights(model)


def distance(one, two):
    return max(np.abs(one[name] - two[name]).max() for name in one)


@pytest.fixture(autouse=True)
def float64():
    """Keras keeps an optimiser's learning rate in its default precision."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def single(number):
    """The float32 next to a number: Keras casts momentum and β through it in any precision."""
    return float(np.float32(number))


B1, B2 = single(0.9), single(0.999)


class PaperAdam(keras.optimizers.Adam):
    """Adam with its ε beside the bias-corrected root, as in the paper's algorithm and in PyTorch.

    Keras multiplies numerator and denominator by √(1 − β₂ᵗ) and leaves ε out of it.
    """

    def __init__(self, *args, epsilon=1e-8, **keywords):
        super().__init__(*args, **keywords)
        self.paper_epsilon = epsilon

    def update_step(self, gradient, variable, learning_rate):
        step = tf.cast(self.iterations + 1, tf.float64)
        self.epsilon = self.paper_epsilon * tf.sqrt(1 - self.beta_2**step)
        super().update_step(gradient, variable, learning_rate)


SGD = {"sgd": {}, "momentum": {"momentum": B1}, "nesterov": {"momentum": B1, "nesterov": True}}


@pytest.mark.parametrize("name", SGD)
def test_sgd_and_its_momenta_agree(task, name):
    one = train_torch(lambda p: torch.optim.SGD(p, lr=0.05, **SGD[name]), task)
    two = train_keras(keras.optimizers.SGD(0.05, **SGD[name]), task)
    assert distance(one, two) <= 1e-12
    assert distance(one, mlp.initial_weights(SPEC, 3)) > 0.1  # it moved


def test_keras_holds_momentum_in_single_precision(task):
    one = train_torch(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), task)
    two = train_keras(keras.optimizers.SGD(0.05, momentum=0.9), task)
    assert 1e-9 < distance(one, two) < 1e-5
    assert float(keras.ops.cast(0.9, "float64")) == single(0.9) != 0.9


def test_momentum_under_a_changing_rate_differs_and_how_to_make_it_equal(task):
    """PyTorch's memory holds gradients, Keras's holds gradients times the rate of their time."""
    schedule = np.where(np.arange(STEPS) < STEPS // 2, 0.05, 0.005)
    one = train_torch(lambda p: torch.optim.SGD(p, lr=1.0, momentum=B1), task, schedule)
    two = train_keras(keras.optimizers.SGD(1.0, momentum=B1), task, schedule)
    assert distance(one, two) > 1e-3

    def rescale(optimizer, number):
        if number == STEPS // 2:
            for memory in optimizer.momentums:
                memory.assign(memory * 0.1)

    equal = train_keras(keras.optimizers.SGD(1.0, momentum=B1), task, schedule, before=rescale)
    assert distance(one, equal) <= 1e-12


def test_adam_with_its_defaults_differs(task):
    one = train_torch(lambda p: torch.optim.Adam(p, lr=0.003), task)
    two = train_keras(keras.optimizers.Adam(0.003), task)
    assert distance(one, two) > 1e-4
    same_number = train_keras(keras.optimizers.Adam(0.003, epsilon=1e-8), task)
    assert distance(one, same_number) > 1e-5  # it stands in another place
    assert (keras.optimizers.Adam().epsilon, keras.optimizers.Adam().beta_2) == (1e-7, 0.999)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
def test_adam_with_its_epsilon_in_the_same_place_agrees(task, epsilon):
    one = train_torch(lambda p: torch.optim.Adam(p, 0.003, (B1, B2), epsilon), task)
    two = train_keras(PaperAdam(0.003, B1, B2, epsilon=epsilon), task)
    assert distance(one, two) <= 1e-12


def test_rmsprop_with_its_defaults_differs(task):
    one = train_torch(lambda p: torch.optim.RMSprop(p, lr=0.003), task)
    two = train_keras(keras.optimizers.RMSprop(0.003), task)
    assert distance(one, two) > 0.05
    same_numbers = train_torch(lambda p: torch.optim.RMSprop(p, 0.003, alpha=0.9, eps=1e-7), task)
    assert distance(same_numbers, two) > 1e-3  # ε inside the root, or beside it


def test_rmsprop_with_an_epsilon_that_decides_nothing_agrees(task):
    one = train_torch(lambda p: torch.optim.RMSprop(p, 0.003, alpha=0.9, eps=1e-30), task)
    two = train_keras(keras.optimizers.RMSprop(0.003, rho=0.9, epsilon=1e-60), task)
    assert distance(one, two) <= 1e-12


def test_weight_decay_is_a_penalty_in_pytorchs_adam_and_decoupled_in_kerass(task):
    decay = {"weight_decay": single(0.1)}
    keras_adam = train_keras(PaperAdam(0.003, B1, B2, **decay), task)
    penalty = train_torch(lambda p: torch.optim.Adam(p, 0.003, (B1, B2), **decay), task)
    decoupled = train_torch(lambda p: torch.optim.AdamW(p, 0.003, (B1, B2), **decay), task)
    assert distance(keras_adam, decoupled) <= 1e-12
    assert distance(keras_adam, penalty) > 0.01
    sgd = train_torch(lambda p: torch.optim.SGD(p, 0.05, **decay), task)
    assert distance(sgd, train_keras(keras.optimizers.SGD(0.05, **decay), task)) <= 1e-12
