"""Less time for compiling: programs kept between runs, and rare ones compiled with less care."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

_SECONDS_WORTH_KEEPING = 0.2  # of compiling; faster ones are compiled again


def keep_compiled_programs() -> Path | None:
    """Let a second start of a run not compile again; call it before anything compiles.

    It is JAX's own persistent cache, in `$XDG_CACHE_HOME/dfkd_jax/xla` (`~/.cache/dfkd_jax/xla`).
    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns it
    off.

    Returns:
      The folder, or None where the environment names another one.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # JAX's key has the program, the versions and the accelerator, but not what instructions the
    # processor has, and code for one may not run on another that shares the home folder.
    folder = root / "dfkd_jax" / "xla" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS_WORTH_KEEPING)
    return folder


def rarely_run() -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for a program that runs once or once an epoch.

    On CPU LLVM then optimises less, in half the time; elsewhere, and where optimisation is turned
    down anyway, None. Everything that uses them must do so on every device count and start, as
    rounding may differ.
    """
    if jax.default_backend() != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 1}


def _processor() -> str:
    """A name for the kind of processor: 16 hexadecimal digits."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = []
    kept = ("model name", "flags", "Features", "CPU part")
    facts = [line for line in lines if line.startswith(kept)]
    facts += [platform.machine(), platform.processor()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
