import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dfkd_jax.runtime import compilation
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

DIRECTORY, SECONDS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings():
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, SECONDS)}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_environment_names_the_folder(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    assert compilation.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == before


def test_the_default_folder_is_the_users_and_the_processors(settings, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation.keep_compiled_programs()
    assert folder.parent == tmp_path / "dfkd_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.2
    assert compilation.keep_compiled_programs() == folder
    monkeypatch.setattr(Path, "read_text", lambda self: "flags\t: fpu sse another_instruction\n")
    assert compilation.keep_compiled_programs() != folder


def test_rare_programs_are_optimised_less_on_a_cpu_alone(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "read", lambda name: False)
        options = compilation.rarely_run()
        patch.setattr(jax, "default_backend", lambda: "tpu")
        assert compilation.rarely_run() is None
    with monkeypatch.context() as patch:  # optimisation is turned down anyway
        patch.setattr(jax.config, "read", lambda name: True)
        assert compilation.rarely_run() is None
    assert options == {"xla_backend_optimization_level": 1}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2  # XLA knows them


@pytest.mark.slow
def test_a_second_start_compiles_nothing_new(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small programs are kept too
    }
    fields = {**TINY, "epochs": 1, "meta.variant": "first_order"}
    fields = [f"--config.{name}={value}" for name, value in fields.items()]

    def programs(workdir):
        command = [sys.executable, "-m", "dfkd_jax.main", "--config=configs/digits.py:mb-dfkd"]
        subprocess.run(
            [*command, f"--workdir={workdir}", *fields],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        )
        return {
            f.name for f in (tmp_path / "dfkd_jax").rglob("*-cache") if "student_step" in f.name
        }

    first = programs(tmp_path / "1")
    assert first
    assert programs(tmp_path / "2") == first
