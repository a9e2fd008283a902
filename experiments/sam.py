"""Settings of the anatomical embedding (SAM): each number with its source.

    python -m experiments.train_sam --config=experiments/sam.py[:preset] --workdir=DIR

Presets are diffs of `paper`; both need --config.data.root=PREPARED:
  paper  ResNet-18 on 96x96x32 views at 2 mm, as the released SAM.pth was trained.
  lite   a narrow network for CPUs, 1.5 million parameters, on scans at 4 mm.

Where `paper` deviates from the public program: the first weights are random, not those
of a 2-D network inflated; coarse positives lie within 8 mm along z in both directions
(there 8 and 6); of the hardest negatives, as many are used on average, not exactly;
noise is added in HU, before scaling. `paper` has not been run to its end: no GPU was at
hand.

Result of `lite` (2000 steps, two shared CPU cores, 69 minutes): validation on unseen
patients, share of anchors nearer to their positive than to every negative, fine 0.62,
coarse 0.75 (views without a common point then counted as misses); matching on real
pairs (experiments/benchmark_matching.py) in docs/embedding.md.
"""

import ml_collections


def get_config(preset: str = "paper") -> ml_collections.ConfigDict:
    """Config of a preset; every field is a number, a string or a tuple."""
    config = ml_collections.ConfigDict()
    config.preset = preset
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.root = ""  # folder made by data_pipeline.prepare
    config.data.read_timeout_s = 600  # as in experiments/unireg.py
    # Volumes of one step over all devices, two views of each; public config: 6 per
    # device.
    config.data.batch_size = 6
    # Share of each task's volumes; the training set of SAM.pth was one collection.
    config.data.weights = ml_collections.ConfigDict(
        {"headneck": 1.0, "chest": 1.0, "abdomen": 1.0, "liver": 1.0, "lung": 1.0}
    )

    config.views = ml_collections.ConfigDict()
    config.views.shape = (96, 96, 32)  # public config of SAM.pth, as all below
    config.views.spacing_mm = 2.0
    config.views.scales = (0.8, 1.2)
    config.views.apart = 0.2
    config.views.rotate_deg = 0.0
    config.views.gain = 0.0
    config.views.shift_hu = 0.0
    config.views.noise_hu = 0.016  # 0.001 of the network's input range

    config.model = ml_collections.ConfigDict()
    config.model.stem = 64
    config.model.stages = (64, 128, 256, 512)
    config.model.channels = 128
    config.model.last_stride = (2, 2, 2)
    config.model.dtype = "float32"
    config.model.conv_impl = "auto"

    config.loss = ml_collections.ConfigDict()
    config.loss.temperature = 0.5
    config.loss.anchors = 100
    config.loss.positive_mm = 2.0
    config.loss.ignore_mm = 20.0
    config.loss.hard = 2000
    config.loss.negatives = 500
    config.loss.coarse_positive_mm = 25.0
    config.loss.coarse_axial_mm = 8.0
    config.loss.coarse_ignore_mm = 5.0
    config.loss.coarse_hard = 250
    config.loss.coarse_negatives = 200
    config.loss.others = 1000

    config.optim = ml_collections.ConfigDict()
    config.optim.name = "sgd"
    config.optim.lr = 0.02
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.clip_norm = 0.0
    config.optim.warmup_steps = 500
    config.optim.decay_steps = 0

    config.train = ml_collections.ConfigDict()
    config.train.steps = 20_000
    config.train.log_every = 50
    config.train.eval_every = 1_000
    config.train.eval_batches = 8
    config.train.checkpoint_every = 500
    config.train.skip_nonfinite = 0  # see unireg.py
    config.train.change = ""  # see unireg.py

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    config.update(ml_collections.ConfigDict(PRESETS[preset]))
    return config.lock()


PRESETS = {
    "paper": {},
    # Not in paper: two CPU cores train it in little over an hour. A quarter of the
    # width; the coarse map at 1/8 in plane, because a cell of 16 voxels of 4 mm is no
    # place in a body. Distances follow the voxel; rotations and contrast make up for
    # few scans.
    "lite": {
        "data": {
            "batch_size": 2,
            "weights": {
                "headneck": 6.0,
                "chest": 2.0,
                "abdomen": 2.0,
                "liver": 2.0,
                "lung": 1.0,
            },
        },
        "views": {
            "shape": (48, 48, 48),
            "spacing_mm": 4.0,
            "apart": 0.1,
            "rotate_deg": 15.0,
            "gain": 0.1,
            "shift_hu": 30.0,
            "noise_hu": 30.0,
        },
        "model": {
            "stem": 16,
            "stages": (16, 32, 64, 96),
            "channels": 48,
            "last_stride": (1, 1, 2),
        },
        "loss": {
            "temperature": 0.2,
            "positive_mm": 4.0,
            "ignore_mm": 16.0,
            "coarse_ignore_mm": 40.0,
            "others": 300,
        },
        "optim": {
            "name": "adam",
            "lr": 2e-3,
            "clip_norm": 1.0,
            "warmup_steps": 100,
            "decay_steps": 2000,
        },
        "train": {
            "steps": 2000,
            "log_every": 20,
            "eval_every": 500,
            "checkpoint_every": 100,
        },
    },
}
