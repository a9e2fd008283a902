"""Run by test_sharding.py in a process with eight simulated devices; prints JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from data_pipeline import loader
from experiments import build, unireg
from unireg_jax.errors import UserError
from unireg_jax.training import checkpoint
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step

STEPS, BATCH = 2, 8


def make_config(root: str):
    """A small network, and SGD: Adam's steps amplify rounding."""
    config = unireg.get_config("demo")
    with config.unlocked():
        config.train.init_from = ""
        config.data.update({"root": root, "shape": (32, 16, 32), "spacing_mm": 12.0})
        config.data.weights.headneck = 1.0
        config.data.batch_size = BATCH
        config.model.update({"encoder": (4,) * 4, "decoder": (4,) * 4})
        config.model.update({"remaining": (4,), "conv_impl": "direct"})
        config.optim.update({"name": "sgd", "lr": 1e-4, "warmup_steps": 0})
        config.optim.update({"decay_steps": 0, "head_scale": 1.0})
    return config


class Run:
    """Trains on so many devices; `overlap` gives every map a second layer."""

    def __init__(self, config, count, *, space=1, accumulate=1, ema=0.9, overlap=False):
        self.overlap = overlap
        self.experiment = build.build(config, "")
        self.mesh = train_mesh.make_mesh(jax.devices()[:count], space=space)
        self.step = train_step.make_train_step(
            self.experiment.loss,
            self.experiment.tx,
            mesh=self.mesh,
            accumulate=accumulate,
            ema=ema,
        )

    def start(self):
        """A fresh state and stream."""
        e = self.experiment
        state = train_state.make_state(e.model, e.tx, seed=0, averaged=True)
        state = jax.device_put(state, train_mesh.replicated(self.mesh))
        stream = loader.make_iterator(
            e.dataset,
            "train",
            batch_size=train_mesh.local_rows(self.mesh, BATCH),
            seed=0,
            weights=e.weights,
        )
        return state, stream

    def train(self, state, stream, steps=STEPS):
        """The state after some steps, the pairs seen, the last loss."""
        seen, scalars = [], {}
        for _ in range(steps):
            batch = next(stream)
            seen.append(sorted(int(p) for p in batch.pair))
            if self.overlap:
                batch = overlapping(batch)
            batch = train_mesh.put(batch, train_mesh.pair_sharding(self.mesh))
            state, scalars = self.step(state, batch, self.experiment.extractor)
        return jax.device_get(state), seen, float(scalars["loss"])


def overlapping(batch):
    """The same organs once more, a little aside: most of them overlap then."""
    return batch._replace(
        fixed_more=np.roll(batch.fixed_labels, 2, axis=1)[:, None],
        moving_more=np.roll(batch.moving_labels, 3, axis=1)[:, None],
    )


def distance(one, other) -> float:
    """Largest difference of two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def equal(one, other) -> bool:
    """True if two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def compare(config, settings, *, overlap=False) -> dict:
    """Each setting against one device."""
    first = Run(config, 1, overlap=overlap)
    start, stream = first.start()
    initial = jax.device_get(start.params)
    state, seen, loss = first.train(start, stream)
    found = {"moved": distance(initial, state.params), "loss": loss, "runs": {}}
    for name, setting in settings.items():
        run = Run(config, **setting, overlap=overlap)
        other, others, value = run.train(*run.start())
        found["runs"][name] = {
            "pairs": others == seen,
            "loss": value,
            "params": distance(state.params, other.params),
            "ema": distance(state.ema, other.ema),
        }
    return found


def restore(config, workdir) -> dict:
    """Twice the same on eight; saved there, restored on fewer, and back."""
    eight = Run(config, 8)
    state, seen, _ = eight.train(*eight.start())
    again, _, _ = eight.train(*eight.start())
    saved = checkpoint.Checkpoints(workdir)
    fresh, stream = eight.start()
    eight_state, _, _ = eight.train(fresh, stream)
    placed = jax.device_put(eight_state, train_mesh.replicated(eight.mesh))
    saved.save(placed, stream)
    saved.close()
    found = {"twice": equal(state, again)}
    expected = sorted(int(p) for p in next(stream).pair)
    for count in (1, 2, 4, 8):
        run = Run(config, count)
        fresh, stream = run.start()
        reader = checkpoint.Checkpoints(workdir)
        there = reader.restore(fresh, stream)
        reader.close()
        following = sorted(int(p) for p in next(stream).pair)
        found[str(count)] = (
            equal(jax.device_get(there), state) and following == expected
        )
    return found


def refusals(config) -> list[str]:
    """Messages for what does not divide."""
    said = []
    for change in (
        {"data": {"batch_size": 6}},
        {"train": {"accumulate": 3}},
        {"train": {"space_devices": 3}},
    ):
        bad = config.copy_and_resolve_references()
        bad.update(change)
        try:
            build.devices(bad, build.build(bad, ""))
        except UserError as error:
            said.append(f"{error.exit_code} {error}")
    return said


def main() -> None:
    root, workdir, mode = sys.argv[1:]
    config = make_config(root)
    if mode == "quick":
        split = {"count": 8, "space": 2, "accumulate": 2}
        found = {"refused": refusals(config)} | compare(
            config, {"4 x 2, in 2 parts": split}, overlap=True
        )
    else:
        settings = {str(n): {"count": n} for n in (2, 4, 8)}
        settings["1 x 4"] = {"count": 4, "space": 4}
        found = compare(config, settings)
        found["restored"] = restore(config, Path(workdir))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
