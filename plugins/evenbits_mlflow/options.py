"""What a suite's [plugins.mlflow] table may say."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from evenbits.compressor import Options
from evenbits.errors import SuiteError


class MlflowOptions(Options):
    enabled: bool = Field(default=True, description="whether this suite's records are mirrored")
    tracking_uri: str | None = Field(
        default=None, description="an MLflow server or database; default: mlflow.db in the results folder"
    )
    timeout_seconds: int = Field(default=5, ge=1, description="how long a call to a server may take")


def read_options(table: Mapping[str, object]) -> MlflowOptions:
    """Raises SuiteError for an unknown key or a wrong type."""
    try:
        return MlflowOptions.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("plugins.mlflow", *map(str, first["loc"])))
        known = ", ".join(MlflowOptions.model_fields)
        raise SuiteError(f"{where}: {first['msg']}; known keys: {known}") from None
