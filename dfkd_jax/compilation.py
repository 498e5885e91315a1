"""Keep compiled programs between runs, so that the second start of a run does not compile again.

JAX's own persistent cache, in `$XDG_CACHE_HOME/dfkd_jax/xla` (`~/.cache/dfkd_jax/xla`).
`JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

_SECONDS_WORTH_KEEPING = 0.2  # of compiling; faster ones are compiled again


def keep_compiled_programs() -> Path | None:
    """Turn the cache on; call it before anything compiles.

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
