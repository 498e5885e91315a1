import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from dfkd_jax import command_line, compare, results, run_folders, train
from dfkd_jax.child_process import Outcome, in_child, run_seeds
from dfkd_jax.config import UserError, to_dict
from dfkd_jax.overall_progress import OverallProgress
from tests.conftest import CHEAP_COMPILATION, TINY, tiny_config

ROOT = Path(__file__).parent.parent
BOTH = ["first_order", "exact"]


def labels(found):
    return [combination.label for combination in found]


def test_meta_methods_run_once_per_gradient_and_others_once(tmp_path):
    methods = ["mb-dfkd", "lra-mb", "dafl", "lra-mb"]
    found = compare.combinations(tiny_config, methods, BOTH, tmp_path)
    assert labels(found) == ["mb-dfkd", "lra-mb_first_order", "lra-mb_exact", "dafl"]
    assert [c.config.meta.variant for c in found] == ["none", "first_order", "exact", "none"]
    teachers = {c.config.teacher.checkpoint for c in found}
    assert teachers == {str(tmp_path / "teacher")}
    # Relative, so that runs kept in a repository go on in any clone of it.
    (one,) = compare.combinations(tiny_config, ["mb-dfkd"], BOTH, Path("results"))
    assert one.config.teacher.checkpoint == "results/teacher"


def test_every_value_of_a_varied_field_is_a_combination(tmp_path):
    varied = compare.settings(["meta.inner_lr=0.1,0.9", "replay.mix=True,False"])
    assert len(varied) == 4 and varied[1] == {"meta.inner_lr": "0.1", "replay.mix": "False"}

    def load(method, **fields):
        return command_line.with_overrides(
            f"configs/digits.py:{method}", {"meta.inner_lr": 0.5}, fields
        )

    found = compare.combinations(load, ["lra-mb"], ["exact"], tmp_path, varied)
    assert [c.label for c in found][1] == "lra-mb_exact meta.inner_lr=0.1 replay.mix=False"
    assert {(c.config.meta.inner_lr, c.config.replay.mix) for c in found} == {
        (lr, mix) for lr in (0.1, 0.9) for mix in (True, False)
    }
    jobs, _ = compare.plan(found, 1, tmp_path)
    assert len({job.workdirs[0] for job in jobs}) == 4 and " " not in str(jobs[0].workdirs[0])


@pytest.mark.parametrize(
    "text, words",
    [("meta.inner_lr", "FIELD=VALUE"), ("a=1,,2", "FIELD=VALUE"), ("seed=1,2", "--seeds")],
)
def test_a_wrong_vary_is_one_sentence(text, words):
    with pytest.raises(UserError, match=words):
        compare.settings([text])


@pytest.mark.parametrize(
    "field, values",
    [("teacher.epochs", "2,9"), ("teacher.seed", "0,1"), ("dataset.validation_size", "0,100")],
)
def test_what_would_need_several_teachers_is_not_varied(tmp_path, field, values):
    def load(method, **fields):
        return command_line.with_overrides(f"configs/digits.py:{method}", given, fields)

    given = {}
    varied = compare.settings([f"{field}={values}"])
    with pytest.raises(UserError, match=rf"--vary is given for {field}, but one teacher"):
        compare.combinations(load, ["mb-dfkd"], ["exact"], tmp_path, varied)
    # Given teachers are not trained, and may be what is varied.
    folders = [write_card(tmp_path / name) for name in ("a", "b")]
    given = {"teacher.checkpoint": folders[0], "teacher.model": "cnn_half"}
    assert len(compare.combinations(load, ["mb-dfkd"], ["exact"], tmp_path, varied)) == 2
    varied = compare.settings([f"teacher.checkpoint={','.join(folders)}"])
    found = compare.combinations(load, ["mb-dfkd"], ["exact"], tmp_path, varied)
    assert [c.config.teacher.checkpoint for c in found] == folders


def write_card(folder):
    card = {"model": "cnn_half", "num_classes": 10, "image_shape": [8, 8, 1]}
    results.write_json(folder / "teacher.json", card)
    return str(folder)


def test_a_teacher_that_is_given_is_kept(tmp_path):
    given = tmp_path / "mine"
    write_card(given)
    fields = {"teacher.checkpoint": str(given)}
    found = compare.combinations(
        lambda method: tiny_config(method, **fields), ["mb-dfkd"], BOTH, tmp_path
    )
    assert found[0].config.teacher.checkpoint == str(given)


def test_a_teacher_of_another_model_in_the_folder_is_refused(tmp_path):
    card = {"model": "lenet5", "num_classes": 10, "image_shape": [8, 8, 1]}
    results.write_json(tmp_path / "teacher" / "teacher.json", card)
    with pytest.raises(UserError, match="a teacher with model 'lenet5'"):
        compare.combinations(tiny_config, ["mb-dfkd"], BOTH, tmp_path)


@pytest.mark.parametrize(
    "methods, gradients, words",
    [
        (["mb-dfkd", "magic"], BOTH, "--methods is 'magic'; allowed are lra-mb, mb-dfkd"),
        ([], BOTH, "--methods is empty; allowed"),
        (["lra-mb"], ["second"], "--gradients is 'second'; allowed are none, detached"),
        (["lra-mb"], [], "--gradients is empty"),
    ],
)
def test_wrong_names_are_one_sentence(tmp_path, methods, gradients, words):
    with pytest.raises(UserError, match=words):
        compare.combinations(tiny_config, methods, gradients, tmp_path)


def test_a_field_that_cannot_work_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"config\.epochs is 0"):
        compare.combinations(lambda method: tiny_config(method, epochs=0), ["dafl"], BOTH, tmp_path)


def test_fields_of_the_command_line_win_over_the_method():
    fields = {"batch_size": 64, "loss.one_hot": 0.25, "generator.channels": (8, 4)}
    config = command_line.with_overrides("configs/cifar100.py:dfad", fields)
    assert (config.method, config.loss.one_hot, config.loss.adversarial) == ("dfad", 0.25, 1.0)
    assert config.generator.channels == (8, 4) and config.replay.entry_size == 64 // 8
    with pytest.raises(command_line.FLAG_ERRORS, match="'magic'; allowed are"):
        command_line.with_overrides("configs/digits.py:magic", {})


def finish(config, folder, seed):
    own = config.copy_and_resolve_references()
    own.seed = seed
    results.write_json(folder / "config.json", to_dict(own))
    results.write_json(folder / "summary.json", {})


def test_finished_runs_are_not_planned_again(tmp_path):
    found = compare.combinations(tiny_config, ["mb-dfkd", "lra-mb"], ["exact"], tmp_path)
    finish(found[0].config, tmp_path / "runs/mb-dfkd/seed2", 2)
    jobs, finished = compare.plan(found, 2, tmp_path)
    names = [job.name for job in jobs]
    assert names == ["mb-dfkd, seed 1", "lra-mb_exact, seed 1", "lra-mb_exact, seed 2"]
    assert finished == 1
    assert jobs[2].workdirs == [tmp_path / "runs/lra-mb_exact/seed2"]
    jobs, finished = compare.plan(found, 3, tmp_path, together=True)
    assert [job.seeds for job in jobs] == [[1, 3], [1, 2, 3]] and finished == 1
    assert jobs[0].name == "mb-dfkd, seeds 1, 3"


def test_seeds_count_from_the_configurations_own(tmp_path):
    found = compare.combinations(
        lambda method: tiny_config(method, seed=40), ["dafl"], BOTH, tmp_path
    )
    jobs, _ = compare.plan(found, 2, tmp_path)
    assert [job.seeds for job in jobs] == [[40], [41]]
    with pytest.raises(UserError, match="--seeds is 0; allowed is 1 or more"):
        compare.plan(found, 0, tmp_path)


def test_seeds_at_once_run_on_one_of_several_devices(tmp_path, monkeypatch):
    called = {}
    monkeypatch.setattr(train, "run_seeds", lambda config, *rest: called.update(config=config))
    config = tiny_config(**{"parallel.devices": 0})
    run_seeds(config, [tmp_path / "1", tmp_path / "2"], [1, 2])
    assert called["config"].parallel.devices == 1 and config.parallel.devices == 0

    def load(method):
        return tiny_config(method, **{"parallel.devices": 4})

    found = compare.combinations(load, ["mb-dfkd"], BOTH, tmp_path)
    assert len(compare.plan(found, 2, tmp_path)[0]) == 2
    with pytest.raises(UserError, match=r"config\.parallel\.devices is 4; .* allowed are 0 and 1"):
        compare.plan(found, 2, tmp_path, together=True)


def test_the_folder_of_another_configuration_is_refused(tmp_path):
    found = compare.combinations(tiny_config, ["mb-dfkd"], BOTH, tmp_path)
    finish(tiny_config("mb-dfkd", epochs=9), tmp_path / "runs/mb-dfkd/seed1", 1)
    with pytest.raises(UserError, match=r"another configuration.* epochs: 9 → 3"):
        compare.plan(found, 1, tmp_path)


def test_a_log_gets_a_line_for_each_run_with_the_time_left(tmp_path):
    out = io.StringIO()
    with OverallProgress(4, 1, Console(file=out, width=200)) as progress:
        progress.start("a, seed 1", tmp_path, 2, 1)
        progress.poll()
        progress.finish("a, seed 1", 60.0, Outcome(True))
        progress.start("a, seed 2", tmp_path, 2, 1)
        progress.finish("a, seed 2", 5.0, Outcome(False, "A loss became non-finite."))
    first, second = out.getvalue().splitlines()
    assert first == "run 2/4  a, seed 1  0:01:00  left 0:02:00  finished"
    assert second.startswith("run 3/4  a, seed 2")
    assert second.endswith("FAILED: A loss became non-finite.")


def test_a_terminal_gets_a_bar(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, _environ={"TERM": "xterm"})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with OverallProgress(2, 0, console) as progress:
        progress.start("a, seed 1", tmp_path, 3, 1)
        progress.finish("a, seed 1", 60.0, Outcome(True))
    assert "a, seed 1  epoch 1/3" in out.getvalue() and "1/2" in out.getvalue()


def never():
    return None


def sigterm():
    return "SIGTERM"


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, arguments, stop, expected",
    [
        (print, ("heard",), never, r"^$"),
        (os._exit, (3,), never, "exit code 3; what it printed is in"),
        (signal.raise_signal, (signal.SIGKILL,), never, "SIGKILL, perhaps for want of memory"),
        (int, ("x",), never, r"^ValueError: invalid literal .* \(the traceback is in"),
        (time.sleep, (300,), sigterm, "It was interrupted"),
    ],
)
def test_a_child_cannot_take_its_parent_along(tmp_path, function, arguments, stop, expected):
    log = tmp_path / "run" / "log.txt"
    outcome = in_child(function, arguments, log, stop)
    assert outcome.finished == (function is print)
    assert re.search(expected, outcome.sentence), outcome
    assert ("heard" in log.read_text()) == (function is print)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Processes share compiled programs, so that only the first of them compiles."""
    return {
        **os.environ,
        **CHEAP_COMPILATION,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def command(workdir, *flags, config="configs/digits.py", **fields):
    fields = {**TINY, "epochs": 2, **fields}
    return [
        *(sys.executable, "-m", "dfkd_jax.compare", f"--config={config}"),
        *("--methods=mb-dfkd,lra-mb", "--seeds=2", f"--workdir={workdir}"),
        *[f"--config.{name}={value}" for name, value in fields.items()],
        *flags,
    ]


def start(environment, *arguments):
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for children in /proc")
def test_a_killed_and_a_stopped_comparison_go_on_without_repeating(environment, tmp_path):
    process = start(environment, *command(tmp_path))
    for line in process.stdout:
        if line.startswith("run 1/4  mb-dfkd, seed 1") and "finished" in line:
            break
    second = tmp_path / "runs/mb-dfkd/seed2/log.txt"
    wait_for(second.exists)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [pid for path in tasks for pid in path.read_text().split()]
    process.kill()
    process.wait()
    # None stays behind to write where the next command will.
    wait_for(lambda: children and not any(is_running(pid) for pid in children), 30)
    first = stamps(tmp_path / "runs/mb-dfkd/seed1")
    teacher = stamps(tmp_path / "teacher")

    process = start(environment, *command(tmp_path))
    log = tmp_path / "runs/lra-mb_exact/seed1/log.txt"
    wait_for(log.exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in out, out
    assert "The same command goes on from there." in out and "SIGTERM came" in out
    assert not list(tmp_path.rglob(run_folders.FAILURE))

    process = start(environment, *command(tmp_path))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert re.search("[23] of 4 runs are finished already", out)
    assert "mb-dfkd, seed 1" not in out and "Training the teacher" not in out
    assert stamps(tmp_path / "runs/mb-dfkd/seed1") == first
    assert stamps(tmp_path / "teacher") == teacher
    table = (tmp_path / "comparison.md").read_text()
    assert "| mb-dfkd | 2 |" in table and "| lra-mb_exact | 2 |" in table
    assert (tmp_path / "report.html").stat().st_size > 100_000
    for seed in (1, 2):
        config = results.read_json(tmp_path / f"runs/lra-mb_exact/seed{seed}/config.json")
        assert (config["seed"], config["meta"]["variant"], config["epochs"]) == (seed, "exact", 2)

    # A failing combination leaves the others and the tables; the finished ones stay.
    fields = {"loss.one_hot": 1e38, "loss.activation": -1e38}
    flags = ("--methods=dafl", "--vectorize_seeds")
    process = start(environment, *command(tmp_path, *flags, **fields))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in out, out
    assert "dafl, seeds 1, 2" in out and "FAILED: A loss became non-finite in epoch 1" in out
    assert "| dafl | 1 | A loss became non-finite" in (tmp_path / "comparison.md").read_text()
    assert stamps(tmp_path / "runs/mb-dfkd/seed1") == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--methods=magic"], "--methods is 'magic'"),
        (["--baseline=magic"], "--baseline is 'magic'; allowed are mb-dfkd, lra-mb_exact"),
        (["--seeds=none"], "seeds"),
        (["--config.meta.variant=exact"], "--config.meta.variant is set by --gradients"),
    ],
)
def test_misuse_is_one_sentence_before_anything_starts(environment, tmp_path, flags, words):
    misused(environment, words, command(tmp_path, *flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_method_after_the_colon_is_refused(environment, tmp_path):
    words = "--config=configs/digits.py, and the method is given as --methods=dafl"
    misused(environment, words, command(tmp_path, config="configs/digits.py:dafl"))


def misused(environment, words, arguments):
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_planning_touches_no_accelerator(environment, tmp_path):
    program = (
        "import sys; from pathlib import Path; from dfkd_jax import compare;"
        "from tests.conftest import tiny_config; from jax._src import xla_bridge;"
        "found = compare.combinations(tiny_config, ['lra-mb', 'lra-gr'], ['exact'], Path('x'));"
        "compare.plan(found, 2, Path('x')); sys.exit(xla_bridge.backends_are_initialized())"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment).returncode == 0
    )
