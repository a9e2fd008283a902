"""Research scripts: configs, training, measurements."""

import os

# Before JAX is imported: with a warm compilation cache XLA reports as an error, for
# every program, that `prefer-no-gather` is no feature of this CPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
