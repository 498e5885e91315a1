"""The page of differences names tests that there are."""

import re

from tests.helpers.paths import ROOT


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs/differences.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 25
    assert named <= defined, named - defined


def test_every_field_that_the_page_names_exists():
    from configs import default
    from dfkd_jax.runtime.fields import get

    page = (ROOT / "docs/differences.md").read_text()
    config = default.get_config()
    fields = re.findall(r"`(?:config\.)?((?:meta|replay|generator|student|loss)\.\w+)", page)
    assert len(fields) > 5
    for field in fields:
        get(config, field)
