"""Measuring compiled programs and peers side by side in one process."""

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Program(NamedTuple):
    """A compiled function bound to its arguments, and what the compiler says of it."""

    run: Callable  # runs once and waits for the result
    compile_s: float  # trace, lower and compile
    scratch_mib: float  # temporary buffers
    flops: float  # of the cost analysis, which counts a loop's body once
    bytes: float  # read and written by its instructions, alike
    least_bytes: float  # arguments and results: what no formulation can avoid
    loops: bool  # flops and bytes are lower bounds


class Timing(NamedTuple):
    """Medians over the counted rounds."""

    cpu_ms: float  # of all threads of this process
    wall_ms: float


def compile_program(function: Callable, *args) -> Program:
    """Compiles `function` for `args`, which stay on the device between runs.

    Args:
        function: of arrays; pytrees are fine.
        *args: what each run gets.

    Returns:
        The program and its figures.

    Raises:
        MemoryError: its buffers exceed what the machine has free.
    """
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    require_memory(memory.temp_size_in_bytes + memory.output_size_in_bytes)
    return describe(program, lambda: jax.block_until_ready(program(*args)), seconds)


def describe(program: jax.stages.Compiled, run: Callable, compile_s: float) -> Program:
    """What the compiler says of a program.

    Args:
        program: compiled.
        run: see Program.
        compile_s: see Program.
    """
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    return Program(
        run=run,
        compile_s=compile_s,
        scratch_mib=memory.temp_size_in_bytes / 2**20,
        flops=cost.get("flops", 0.0),
        bytes=cost.get("bytes accessed", 0.0),
        least_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes,
        loops=" while(" in program.as_text(),
    )


def measure(candidates: dict[str, Callable], repeats: int) -> dict[str, Timing]:
    """Runs the candidates in turn, `repeats` + 1 times; the first round warms up.

    Args:
        candidates: name -> function that runs once and waits for its result.
        repeats: counted rounds.

    Returns:
        name -> median CPU and wall time.
    """
    times: dict[str, list] = {name: [] for name in candidates}
    for i in range(repeats + 1):
        for name, run in candidates.items():
            # Worker threads of the one before spin for milliseconds: not on our clock.
            time.sleep(0.01)
            cpu, wall = time.process_time(), time.perf_counter()
            result = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            del result  # freeing it is nobody's time
            if i:
                times[name].append((1e3 * cpu, 1e3 * wall))
    gc.collect()
    return {name: Timing(*np.median(rows, axis=0)) for name, rows in times.items()}


def count_macs(jaxpr: Any) -> int:
    """Multiply-adds of the convolutions and products of a traced program.

    Args:
        jaxpr: of `jax.make_jaxpr(…).jaxpr`; a loop's body counts once.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[:-1])
        elif eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            size = math.prod(lhs[i] for i in contract)
            total += math.prod(eqn.outvars[0].aval.shape) * size
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += count_macs(inner)
    return total


def machine_limits(repeats: int) -> dict[str, float]:
    """Best rates seen on this device: a float32 matrix product, and a large copy.

    Args:
        repeats: runs of each; the fastest counts.

    Returns:
        "matmul_flops": floating-point operations per second of wall time, the better of
        XLA's product and, where installed and on the same device, PyTorch's;
        "copy_bytes": bytes read plus written per second of wall time.
    """
    length = 2**26
    flops = max(_product_flops(size, repeats) for size in (2048, 4096))
    # In place: fresh pages would be cleared by the operating system first. 256 MiB,
    # far beyond the caches.
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    state = [jnp.ones(length, jnp.float32)]

    def copy():
        state.append(jax.block_until_ready(add(state.pop())))

    return {"matmul_flops": flops, "copy_bytes": 8 * length / _fastest(copy, repeats)}


def require_memory(needed: float) -> None:
    """Raises MemoryError if `needed` bytes exceed the host's free memory."""
    meminfo = Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not meminfo.exists():
        return  # the device's allocator says so itself
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if needed > 0.9 * free:
        raise MemoryError(
            f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def _product_flops(size: int, repeats: int) -> float:
    a = jnp.ones((size, size), jnp.float32)
    products = [compile_program(jnp.matmul, a, a).run]
    if product := _torch_product(size):
        products.append(product)
    return 2 * size**3 / min(_fastest(run, repeats) for run in products)


def _torch_product(size: int) -> Callable | None:
    """The matrix product in PyTorch, None without it or on an accelerator."""
    try:
        import torch
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None
    a = torch.ones(size, size)
    return lambda: a @ a


def _fastest(run: Callable, repeats: int) -> float:
    """Least wall seconds of a run, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
