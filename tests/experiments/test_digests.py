"""What of a source counts for the figures that were made with it."""

import pytest

from experiments import digests
from unireg_jax.evaluation import metrics, regularity


@pytest.fixture
def digest(tmp_path):
    """Of a module of this text."""

    def of(text):
        (tmp_path / "a.py").write_text(text)
        return digests.of([tmp_path / "a.py"])

    return of


def test_comments_and_layout_do_not_count(digest):
    one = digest('"""Says."""\nx = f"{\', \'.join(y)}"  # so\n')
    assert digest("x = (\n    f\"{', '.join(y)}\"\n)\n") == one
    assert digest("x = f\"{'; '.join(y)}\"\n") != one
    # The same for every Python: trees print otherwise from version to version.
    assert one.startswith("2d1bfe63584c")


def test_other_files_count_as_they_are(tmp_path):
    (tmp_path / "a.json").write_text("{ }")
    one = digests.of([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text("{}")
    assert digests.of([tmp_path / "a.json"]) != one


def test_imported_follows_imports_within_the_package():
    found = digests.imported((metrics, regularity))
    names = {str(path.relative_to(digests.LIBRARY)) for path in found}
    assert {"evaluation/metrics.py", "imaging/surface.py", "imaging/grids.py"} <= names
    assert not any(name.startswith(("registration", "training")) for name in names)


def test_imported_refuses_what_it_cannot_follow(tmp_path, monkeypatch):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.py").write_text("from . import tables\n")
    monkeypatch.setattr(digests, "LIBRARY", tmp_path)
    with pytest.raises(ValueError, match="whole names"):
        digests.imported((metrics,))
