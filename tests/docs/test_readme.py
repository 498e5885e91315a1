"""What the README names is there, and what is there it names."""

import re

from tests.helpers.paths import ROOT

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
