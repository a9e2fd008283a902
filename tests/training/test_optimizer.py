"""Gradient transformations: what every option of `make_optimizer` does to a step."""

import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.training import optimizer


def follow(tx, gradients, start):
    """Parameters after each step, [N, P] float64."""
    params = {"backbone": {"w": jnp.asarray(start, jnp.float32)}}
    state, found = tx.init(params), []
    for gradient in gradients:
        grads = {"backbone": {"w": jnp.asarray(gradient, jnp.float32)}}
        updates, state = tx.update(grads, state, params)
        params = {"backbone": {"w": params["backbone"]["w"] + updates["backbone"]["w"]}}
        found.append(np.asarray(params["backbone"]["w"], np.float64))
    return np.array(found)


def test_sgd_has_the_momentum_and_decay_asked_for():
    """v <- momentum v + g + decay p,  p <- p - lr v: PyTorch's, and the paper's."""
    lr, momentum, decay = 0.1, 0.9, 0.25
    gradients = np.array([[3.0, -4.0], [1.0, 2.0], [-2.0, 0.5]])
    tx = optimizer.make_optimizer("sgd", lr=lr, momentum=momentum, weight_decay=decay)
    p, v, expected = np.array([1.0, 2.0]), 0.0, []
    for g in gradients:
        v = momentum * v + g + decay * p
        p = p - lr * v
        expected.append(p)
    found = follow(tx, gradients, [1.0, 2.0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32


@pytest.mark.parametrize(("clip_norm", "first"), [(1.0, (-0.6, -0.8)), (0.0, (-3, -4))])
def test_clip_norm_shortens_long_gradients_alone(clip_norm, first):
    tx = optimizer.make_optimizer("sgd", lr=1.0, momentum=0.0, clip_norm=clip_norm)
    found = follow(tx, [[3.0, 4.0], [0.3, 0.4]], [0.0, 0.0])
    np.testing.assert_allclose(found[0], first, rtol=1e-6)
    np.testing.assert_allclose(found[1] - found[0], [-0.3, -0.4], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adam_decays_weights_by_the_rate(decay):
    """Adam's first step is lr sign(g); AdamW's has lr decay p besides."""
    tx = optimizer.make_optimizer("adam", lr=0.01, weight_decay=decay)
    start = np.array([1.0, 3.0])
    found = follow(tx, [[3.0, -4.0]], start)
    expected = start - 0.01 * (np.array([1.0, -1.0]) + decay * start)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)  # float32, and its eps


@pytest.mark.parametrize(
    ("warmup", "decay", "rates"),
    [
        (0, 0, {0: 1.0, 999: 1.0}),
        (4, 0, {0: 0.0, 1: 0.25, 4: 1.0, 99: 1.0}),
        # Half-way from 2 to 10 a cosine is at the mean of 1 and 0.02.
        (2, 10, {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.51, 10: 0.02, 99: 0.02}),
        (0, 10, {0: 1.0, 5: 0.51, 10: 0.02, 99: 0.02}),
    ],
)
def test_schedule_rises_and_falls(warmup, decay, rates):
    schedule = optimizer.make_schedule(0.3, warmup, decay)
    found = [float(schedule(step)) for step in rates]
    np.testing.assert_allclose(found, 0.3 * np.array(list(rates.values())), atol=1e-7)


def test_optimizer_follows_its_schedule():
    tx = optimizer.make_optimizer(
        "sgd", lr=1.0, momentum=0.0, warmup_steps=2, decay_steps=6
    )
    lengths = -np.diff(follow(tx, np.ones((8, 1)), [0.0])[:, 0], prepend=0.0)
    np.testing.assert_allclose(
        lengths[[0, 1, 2, 4, 6, 7]], [0.0, 0.5, 1.0, 0.51, 0.02, 0.02], atol=1e-6
    )


def test_optimizer_head_scale_touches_the_head_alone():
    params = {"backbone": {"w": jnp.ones(3)}, "head": {"w": jnp.ones(3)}}
    updates = []
    for scale in (1.0, 0.1):
        tx = optimizer.make_optimizer("adam", lr=0.5, head_scale=scale)
        updates.append(tx.update(params, tx.init(params), params)[0])
    np.testing.assert_allclose(updates[1]["head"]["w"], 0.1 * updates[0]["head"]["w"])
    np.testing.assert_array_equal(
        updates[1]["backbone"]["w"], updates[0]["backbone"]["w"]
    )


@pytest.mark.parametrize(
    ("name", "lr", "match"),
    [("rmsprop", 1.0, "must be one of"), ("sgd", 0.0, "lr must")],
)
def test_optimizer_rejects(name, lr, match):
    with pytest.raises(ValueError, match=match):
        optimizer.make_optimizer(name, lr=lr)
