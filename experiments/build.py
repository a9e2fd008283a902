"""ConfigDict -> plain arguments -> data, model, optimiser, objective.

The only reader of the config: below this file, functions take plain arguments.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import optax

from data_pipeline import loader, synthetic
from experiments import prealign
from unireg_jax.errors import USAGE, UserError
from unireg_jax.models.unireg import UniReg
from unireg_jax.training import objective, optimizer


class Experiment(NamedTuple):
    """What a config describes.

    Attributes:
        dataset: prepared volumes.
        weights: task -> share, for the tasks that have training pairs.
        model: the network; params of `model.init`.
        tx: gradient transformation.
        loss: loss(params, batch) -> (loss, scalars).
        spec: model card fields that released weights carry.
        num_labels: label ids including background, over all tasks.
        view: keyword arguments backend, hu_low, hu_high: how the network sees HU.
    """

    dataset: loader.Dataset
    weights: dict[str, float]
    model: UniReg
    tx: optax.GradientTransformation
    loss: Any
    spec: dict[str, Any]
    num_labels: int
    view: dict[str, Any]


def build(config: ml_collections.ConfigDict, workdir: Path | str) -> Experiment:
    """Builds everything a run needs.

    Args:
        config: from experiments/unireg.py.
        workdir: where phantoms go when the config asks for them.

    Raises:
        UserError: exit code 2 or 3: no data, data on another grid, a bad number.
    """
    dataset = _dataset(config, workdir)
    model = UniReg(**architecture(config))
    num_labels = 1 + max(len(t["labels"]) for t in dataset.index["tasks"].values())
    try:
        tx = optimizer.make_optimizer(**config.optim.to_dict())
        view = {
            "backend": config.model.features,
            "hu_low": config.data.hu_window[0],
            "hu_high": config.data.hu_window[1],
        }
        weights = objective.Weights(num_labels=num_labels, **config.loss.to_dict())
    except (TypeError, ValueError) as error:
        raise UserError("schema", f"config: {error}", USAGE) from error
    apply_fn = functools.partial(apply, model)
    return Experiment(
        dataset=dataset,
        weights=_task_weights(config, dataset),
        model=model,
        tx=tx,
        loss=objective.make_loss(apply_fn, weights=weights, **view),
        spec={
            "architecture": architecture(config),
            "features": config.model.features,
            "preprocess": dataset.index["spec"],
        },
        num_labels=num_labels,
        view=view,
    )


def apply(model: UniReg, params: Any, *args: Any, **kwargs: Any) -> Any:
    """The network as a function of its parameters."""
    return model.apply({"params": params}, *args, **kwargs)


def architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Arguments of UniReg."""
    fields = config.model.to_dict()
    del fields["features"]
    return fields


def _dataset(config: ml_collections.ConfigDict, workdir: Path | str) -> loader.Dataset:
    data = config.data
    root = data.root
    if not root and data.phantoms:
        root = Path(workdir) / "phantoms"
        if not (root / "index.json").exists():
            synthetic.write_dataset(
                root,
                shape=data.shape,
                spacing_mm=data.spacing_mm,
                subjects_per_task=data.phantoms,
                seed=config.seed,
                tasks=[task for task, share in data.weights.items() if share],
            )
        prealign.prealign(root)
    if not root:
        raise UserError(
            "schema",
            f"preset {config.preset!r} trains on scans: config.data.root expected, "
            "none given; prepare them with `python -m data_pipeline.prepare` and pass "
            "--config.data.root=FOLDER, or try --config=experiments/unireg.py:demo",
            USAGE,
        )
    dataset = loader.Dataset(root)
    spec = dataset.index["spec"]
    wanted = (tuple(data.shape), (data.spacing_mm,) * 3)
    found = (tuple(spec["shape"]), tuple(spec["spacing_mm"]))
    if wanted != found:
        raise UserError(
            "grid_mismatch",
            f"{root}: {wanted[0]} at {wanted[1][0]} mm expected by the config, "
            f"{found[0]} at {found[1][0]} mm found; prepare with --shape and --spacing "
            "of the config, or set config.data.shape and config.data.spacing_mm",
            USAGE,
        )
    return dataset


def _task_weights(
    config: ml_collections.ConfigDict, dataset: loader.Dataset
) -> dict[str, float]:
    """Shares of the tasks that have training pairs."""
    present = {pair.task for pair in dataset.pairs("train")}
    wanted = config.data.weights.to_dict()
    weights = {k: v for k, v in wanted.items() if k in present and v > 0}
    if not weights:
        raise UserError(
            "schema",
            f"{dataset.root}: no training pair of any weighted task "
            f"({', '.join(k for k, v in wanted.items() if v)}); check the split column "
            "of the manifest and config.data.weights",
            USAGE,
        )
    return weights
