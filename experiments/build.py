"""ConfigDict -> plain arguments -> data, model, optimiser, objective.

The only reader of the config: below this file, functions take plain arguments.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import optax

from data_pipeline import augment, loader, store, streams, synthetic
from experiments import prealign, settings
from unireg_jax.errors import USAGE, UserError, tell
from unireg_jax.models import backbone
from unireg_jax.models.conditioning import HEADS
from unireg_jax.models.features import COMBINE, FEATURES, Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import dice
from unireg_jax.registration import embedding, prediction
from unireg_jax.tasks import Region
from unireg_jax.training import mesh, objective, optimizer

EMBEDDING = "embedding.safetensors"  # beside the weights of a run


class Experiment(NamedTuple):
    """What a config describes.

    Attributes:
        dataset: prepared volumes.
        weights: task -> share, for the tasks that have training pairs.
        streams: made pairs, whose shares come off those of the tasks.
        augment: how much the training pairs are changed.
        model: the network; params of `model.init`.
        tx: gradient transformation.
        loss: loss(params, batch) -> (loss, scalars).
        spec: model card fields that released weights carry.
        num_labels: label ids including background, over all tasks.
        extractor: of the features, and of the HU window.
        embedding: file of its network, or None.
    """

    dataset: loader.Dataset
    weights: dict[str, float]
    streams: tuple[loader.Stream, ...]
    augment: augment.AugmentSpec
    model: UniReg
    tx: optax.GradientTransformation
    loss: Any
    spec: dict[str, Any]
    num_labels: int
    extractor: Extractor
    embedding: Path | None


def build(config: ml_collections.ConfigDict, workdir: Path | str) -> Experiment:
    """Builds everything a run needs.

    Args:
        config: from experiments/unireg.py.
        workdir: where phantoms go when the config asks for them.

    Raises:
        UserError: exit code 2 or 3: no data, data on another grid, a bad number.
    """
    _check(config)
    try:
        fields = {"conv_impl": conv_impl(), **architecture(config)}
        model = UniReg(**fields, remat=config.model.remat)
        tx = optimizer.make_optimizer(**config.optim.to_dict())
        weights = objective.Weights(**config.loss.to_dict())
    except (TypeError, ValueError) as error:
        raise UserError("schema", f"config: {error}", USAGE) from error
    extractor, source, described = _extractor(config)
    low, high = map(float, config.data.hu_window)  # prepared volumes hold all HU
    dataset = _dataset(config, workdir)
    made = streams.make_streams(
        dataset,
        config.data.streams.to_dict(),
        config.data.weights.to_dict(),
        seed=config.seed,
    )
    vocabularies = [t["labels"] for t in dataset.index["tasks"].values()]
    vocabularies += [stream.label_names for stream in made]
    # Without any label Dice still compiles, and counts nothing.
    num_labels = 1 + max(1, *map(len, vocabularies))
    weights = weights._replace(num_labels=num_labels)
    apply_fn = functools.partial(apply, model)
    return Experiment(
        dataset=dataset,
        weights=_task_weights(config, dataset),
        streams=made,
        augment=augment.AugmentSpec(**config.data.augment.to_dict()),
        model=model,
        tx=tx,
        loss=objective.make_loss(apply_fn, weights=weights, passes=config.train.passes),
        spec={
            "architecture": architecture(config),
            **described,
            "preprocess": dataset.index["spec"] | {"hu_low": low, "hu_high": high},
        },
        num_labels=num_labels,
        extractor=extractor,
        embedding=source,
    )


def devices(config: ml_collections.ConfigDict, experiment: Experiment):
    """The mesh of all devices, and the pairs of a batch that this process loads.

    Raises:
        UserError: `schema`, exit code 2: the batch or the devices do not divide, or
            there are more devices than pairs.
    """
    space = config.train.space_devices
    shared = mesh.make_mesh(space=space)
    if config.data.shape[0] % space:
        raise UserError(
            "schema",
            "config.train.space_devices: a divisor of config.data.shape[0] = "
            f"{config.data.shape[0]}, which is shared out, expected, got {space}",
            USAGE,
        )
    count = shared.shape["data"]
    rows = mesh.local_rows(
        shared, config.data.batch_size, accumulate=config.train.accumulate
    )
    tasks = [pair.task for pair in experiment.dataset.pairs("train")]
    pairs = sum(task in experiment.weights for task in tasks)
    if pairs < count:
        raise UserError(
            "schema",
            f"{experiment.dataset.root}: at least as many training pairs as devices "
            f"along the data axis ({count}) expected, got {pairs}; use fewer devices, "
            "or more with config.train.space_devices",
            USAGE,
        )
    return shared, rows


def apply(model: UniReg, params: Any, *args: Any, **kwargs: Any) -> Any:
    """The network as a function of its parameters."""
    return model.apply({"params": params}, *args, **kwargs)


def architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Arguments of UniReg that released weights carry."""
    fields = config.model.to_dict()
    for name in ("features", "embedding", "combine", "precision", "remat"):
        del fields[name]
    return fields


def conv_impl() -> str:
    """Formulation of the convolutions on the devices of this run, see ops/conv.py.

    "auto" would leave it to the compiler, and trace both: a third of the time that
    tracing the step takes.
    """
    return "cpu" if mesh.all_devices()[0].platform == "cpu" else "direct"


def _extractor(
    config: ml_collections.ConfigDict,
) -> tuple[Extractor, Path | None, dict[str, Any]]:
    """The features, their file, and what the model card says of them."""
    model = config.model
    card = {"features": model.features, "combine": model.combine}
    source = None
    if model.features == "sam":
        source = embedding.find_embedding(model.embedding or None)
    extractor = embedding.load_extractor(
        source or model.features,
        window=tuple(config.data.hu_window),
        combine=model.combine,
    )
    if source:
        card["embedding"] = {"name": EMBEDDING, "sha256": extractor.digest}
    spacing = (config.data.spacing_mm,) * 3
    if extractor.spacing_mm not in (None, spacing):
        tell(
            f"warning: the embedding was trained on voxels of {extractor.spacing_mm} "
            f"mm, config.data.spacing_mm is {config.data.spacing_mm}"
        )
    return extractor, source, card


# The least value of numbers.
_LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.read_timeout_s": 1,
    "model.svf_steps": 0,
    "loss.dice": 0,
    "loss.ncc_window": 3,
    "optim.head_scale": 0,
    "train.steps": 0,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.eval_pairs": 0,
    "train.image_every": 0,
    "train.checkpoint_every": 1,
    "train.skip_nonfinite": 0,
    "train.accumulate": 1,
    "train.space_devices": 1,
    "train.watchdog_s": 1,
}
# Fields with a closed choice.
_CHOICES = {
    "data.on_fault": loader.ON_FAULT,
    "model.conditioner": tuple(HEADS),
    "model.features": tuple(FEATURES),
    "model.combine": COMBINE,
    "model.dtype": ("float32", "bfloat16"),
    "model.precision": mesh.PRECISIONS,
    "model.remat": backbone.REMAT,
    "loss.dice_counting": tuple(dice.COUNTING),
    "loss.reg_units": objective.REG_UNITS,
    "optim.name": optimizer.OPTIMIZERS,
}


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuses values that no run can have, all at once and before anything is made."""
    fields = settings.flat(config, ("data", "model", "loss", "optim", "train"))
    encoder, decoder = config.model.encoder, config.model.decoder
    depth = len(encoder)
    shape, window = config.data.shape, config.data.hu_window
    rules = {
        **settings.shared_rules(fields),
        **{f: (fields[f] >= n, f"{n} or more") for f, n in _LEAST.items()},
        **{f: (fields[f] in c, f"one of {', '.join(c)}") for f, c in _CHOICES.items()},
        "model.embedding": (
            config.model.features == "sam" or not config.model.embedding,
            "'' or model.features=sam",
        ),
        "model.encoder": (_whole(encoder) and 0 < depth < 5, "1 to 4 channel numbers"),
        "model.decoder": (
            _whole(decoder) and len(decoder) == depth,
            "as many channel numbers as model.encoder",
        ),
        "model.remaining": (_whole(config.model.remaining), "channel numbers"),
        "model.field_level": (
            fields["model.field_level"] in range(depth),
            "a level of model.encoder, from 0",
        ),
        "data.shape": (
            _whole(shape) and len(shape) == 3 and not any(n % 16 for n in shape),
            "three multiples of 16",
        ),
        "data.spacing_mm": (config.data.spacing_mm > 0, "more than 0"),
        "train.passes": (
            config.train.passes in range(1, prediction.MOST_PASSES + 1),
            f"1 to {prediction.MOST_PASSES}",
        ),
        "train.ema": (0 <= config.train.ema < 1, "from 0 to less than 1"),
        "data.hu_window": (len(window) == 2 and window[0] < window[1], "(low, high)"),
        "loss.ncc_scales": (config.loss.ncc_scales in range(1, 5), "1 to 4"),
        "loss.smoothness": (
            len(config.loss.smoothness) == len(Region)
            and all(x >= 0 for x in config.loss.smoothness),
            f"{len(Region)} numbers from 0, one per region",
        ),
    }
    if not config.loss.ncc_window % 2:
        rules["loss.ncc_window"] = (False, "an odd number")
    shares = config.data.streams.to_dict()
    for kind, share in shares.items():
        fits = share >= 0 and sum(shares.values()) <= 1
        rules[f"data.streams.{kind}"] = (fits, "0 or more, all together at most 1")
    change = config.data.augment.to_dict()
    if fault := augment.find_fault(augment.AugmentSpec(**change)):
        rules[f"data.augment.{fault[0]}"] = (False, fault[1])
    settings.refuse_faults(fields, rules)


def _whole(values: Sequence[Any]) -> bool:
    """True for positive whole numbers."""
    return all(isinstance(n, int) and n > 0 for n in values)


def _dataset(config: ml_collections.ConfigDict, workdir: Path | str) -> loader.Dataset:
    data = config.data
    root = data.root
    if not root and data.phantoms:
        root = store.make_folders(Path(workdir) / "phantoms")
        if jax.process_index() == 0:  # the others come when it is done
            with store.lock(root):
                _make_phantoms(config, root)
    if not root:
        raise UserError(
            "schema",
            f"preset {config.preset!r} trains on scans: config.data.root expected, "
            "none given; prepare them with `python -m data_pipeline.prepare` and pass "
            "--config.data.root=FOLDER, or try --config=experiments/unireg.py:demo",
            USAGE,
        )
    dataset = loader.Dataset(root, read_timeout_s=data.read_timeout_s)
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


def _make_phantoms(config: ml_collections.ConfigDict, root: Path) -> None:
    """Phantoms and their alignments, those that are not there yet."""
    data = config.data
    if not (root / store.INDEX_NAME).exists():
        synthetic.write_dataset(
            root,
            shape=data.shape,
            spacing_mm=data.spacing_mm,
            subjects_per_task=data.phantoms,
            seed=config.seed,
            tasks=[task for task, share in data.weights.items() if share],
        )
    prealign.prealign(root)


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
