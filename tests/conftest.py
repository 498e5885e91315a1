"""What holds for every test: the environment, set before anything imports JAX, and fixtures."""

import contextlib
import gc
import os
import re
import sys
import tempfile
from pathlib import Path

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do, and they check numbers, not speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Runs in this process use one of these, but where a test asks for more.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
# Fusions by XLA's older emitters compile in a fifth of the time. XLA aborts at flags that it does
# not know, so a version that may have dropped this one does without.
if jaxlib.version.__version__.startswith("0.10.") and "emitters" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Many tests compile the same programs; the workers of one session inherit its cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="dfkd_jax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest
from matplotlib.figure import Figure

from dfkd_jax.run import checkpoint, train
from dfkd_jax.runtime import host_memory

host_memory.keep_freed_memory()
MANY_MAPS = 30_000  # of the 65,530 that Linux allows a process


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each keeps memory mapped, of which a process may have only so much: a session has thousands.

    The cache on disk has them for whoever needs them again. As long as there are few they stay, as
    forgetting takes time too.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Runs in this process leave no figures, which take as long as a third of a small one.

    Those that a command starts do, and tests look at them.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "_draw_figures", lambda *arguments: None)
        yield


@pytest.fixture
def open_checkpoints():
    """As `checkpoint.open_checkpoints`; what it has opened is closed after the test."""
    with contextlib.ExitStack() as opened:
        yield lambda folder: opened.enter_context(checkpoint.open_checkpoints(folder))


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def own_method_example(tmp_path_factory):
    """The file of the example in docs/own_method.md, which Python then finds as `pixels`."""
    text = (Path(__file__).parent.parent / "docs" / "own_method.md").read_text()
    path = tmp_path_factory.mktemp("own_method") / "pixels.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.S).group(1))
    sys.path.insert(0, str(path.parent))
    yield path
    sys.path.remove(str(path.parent))
    sys.modules.pop("pixels", None)


@pytest.fixture(scope="session")
def environment():
    """Of processes that a test starts; they share compiled programs, those of other workers too."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"] + "/processes",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parent / "helpers" / "without_torch"),
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved, to look at what is in them."""
    saved = []
    original = Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved
