"""The verbs of the command line: one module each, imported only when called.

A module has `HELP`, one line; `add_arguments(parser)`; and `run(args)`, which returns
an exit code of unireg_jax/errors.py. Importing it must not import JAX: verbs that need
it reach it through the lazy names of `unireg_jax.registration`, once the files are
read.
"""
