"""What the README names is there, and what is there it names."""

import re

import jax
import jax.numpy as jnp
import pytest

from dfkd_jax.networks.classifiers import create_classifier
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

README = (ROOT / "README.md").read_text()


def test_every_folder_is_named():
    folders = {f"{path.parent.name}/" for path in (ROOT / "dfkd_jax").glob("*/__init__.py")}
    assert len(folders) > 8
    assert not {name for name in folders if not re.search(rf"\b{name}", README)}


def test_every_file_that_is_linked_or_run_is_there():
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    run = re.findall(r"--config=(configs/\w+\.py)", README)
    launched = re.findall(r"\b(launch/\w+\.(?:sh|sbatch))", README)
    assert len(linked) > 5 and run and launched
    assert not [name for name in {*linked, *run, *launched} if not (ROOT / name).exists()]


def test_every_link_to_a_heading_finds_it():
    """In the README and in RESULTS.md, by GitHub's rule for anchors."""
    files = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md")}

    def anchors(text):
        headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for name, text in files.items():
        for file, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", text):
            assert anchor in anchors(files[file or name]), (name, file, anchor)


@pytest.mark.slow
def test_the_example_of_distill_runs(capsys):
    """As it stands, but for its length and for the teacher, which it leaves to the reader."""
    (code,) = re.findall(r"```python\n(import dfkd_jax\n.*?)```", README, re.S)
    short = {n: v for n, v in TINY.items() if not n.startswith("teacher.")}
    assert '{"epochs": 5}' in code
    module = create_classifier("cnn_half", 10)
    variables = module.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False)
    names = {"module": module, "variables": variables}
    exec(code.replace('{"epochs": 5}', repr({**short, "epochs": 1})), names)
    assert len(names["result"].history) == 1
    assert capsys.readouterr().out.startswith("1 ")
