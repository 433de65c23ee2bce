"""What tests of several plugins share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made by the mirror itself. That takes seconds, so it is done once; tests copy it."""
    pytest.importorskip("mlflow", reason='needs pip install "evenbits[mlflow]"')
    from evenbits_mlflow.tracking import Mirror, default_uri

    results = tmp_path_factory.mktemp("tables")
    folder = results / "runs" / "other"
    folder.mkdir(parents=True)
    Mirror(default_uri(results), "other", folder, results, {}).close([])
    return results / "mlflow.db"
