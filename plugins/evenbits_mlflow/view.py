"""Saved views of MLflow's page on a suite: a leaderboard, and charts of bits against quality and of the layers.

Without one the page opens on one folded row and empty charts: it lists and draws nothing but parents until these are
unfolded; sorted by a metric it lists every trial. A view is a tag of the experiment, in the form in which the page
itself keeps a view that is shared: deflated JSON. A page that does not know it shows its own default.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import urlencode

from evenbits.plots import BEYOND
from evenbits.rows import Column, Row
from evenbits.tables import Table
from evenbits_mlflow.mirror import LAYER, accepted

LOOKED_AT = "3"  # major version of the MLflow whose page shows these views as meant
KEY, CHARTS_KEY = "evenbits", "evenbits-charts"
VIEW_PREFIX = "mlflow.sharedViewState."
WORKFLOW = ("workflowType", "machine_learning")  # else the page may open on its views of language-model traces
CURVES = (f"{LAYER}calibrated_error", f"{LAYER}error", f"{LAYER}bits")
SHOWN = 3  # qualities with a column; two of them have a chart
LONGEST = 5000  # characters of an experiment's tag; some servers refuse more


def view_paths(experiment: str) -> dict[str, str]:
    """What to look at, and where it is below the address of a server: under another MLflow the experiment itself."""
    if version("mlflow").split(".")[0] != LOOKED_AT:
        return {f"no saved views, these are for MLflow {LOOKED_AT}": f"#/experiments/{experiment}"}
    return {"trials": _view_path(experiment, charts=False), "charts": _view_path(experiment, charts=True)}


def _view_path(experiment: str, *, charts: bool) -> str:
    key, mode = (CHARTS_KEY, [("compareRunsMode", "CHART")]) if charts else (KEY, [])
    return f"#/experiments/{experiment}/runs?" + urlencode([WORKFLOW, ("viewStateShareKey", key), *mode])


def views(table: Table) -> dict[str, str]:
    """Tags of an experiment: the list of all trials, and the charts. None where nothing says how good a model is."""
    columns = _by_mirrored_name(column for model in table.models for column in model.columns if column.quality)
    if not columns:
        return {}
    filters = {KEY: "", CHARTS_KEY: chart_filter(table, next(iter(columns.values())))}
    packed = {VIEW_PREFIX + key: _packed(_state(columns, condition)) for key, condition in filters.items()}
    return {key: text for key, text in packed.items() if len(text) <= LONGEST}


def chart_filter(table: Table, column: Column) -> str:
    """A search that leaves out what would stretch the axes until nothing else can be told apart: the dense models with
    their many bits, and what is BEYOND times worse than they or, without them, than the best."""
    condition = "params.method != 'dense'"
    worst, limit = 0.0, 0.0
    for model in table.models if column.better == "lower" else ():
        rows = [row for section in model.sections for row in (*section.rows, *section.outside)]
        values, dense = _values(rows, column), _values(model.dense[:1], column)
        if values or dense:
            worst, limit = max([worst, *values]), max(limit, BEYOND * min(dense or values))
    (name,) = accepted([column.name]).values()
    return condition if worst <= limit else f"{condition} and metrics.`{name}` < {limit:.4g}"


def _by_mirrored_name(columns: Iterable[Column]) -> dict[str, Column]:
    """The first of each name, by what the metric is called in MLflow."""
    found: dict[str, Column] = {}
    for column in columns:
        found.setdefault(column.name, column)
    names = accepted(found)
    return {names[name]: column for name, column in found.items()}


def _values(rows: Sequence[Row], column: Column) -> list[float]:
    cells = [row.cells[column.key] for row in rows if column.key in row.cells]
    return [cell.value for cell in cells if math.isfinite(cell.value)]


def _packed(state: Mapping[str, Any]) -> str:
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()


def _state(columns: Mapping[str, Column], condition: str) -> dict[str, Any]:
    first, *_ = columns.values()
    names = list(columns)[:SHOWN]
    return {
        "searchFilter": condition, "orderByKey": f"metrics.`{names[0]}`", "orderByAsc": first.better == "lower",
        "startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": [
            "params.`budget`", "params.`recovery`", "metrics.`bits.linear`", *(f"metrics.`{name}`" for name in names),
            "metrics.`calibrated_error/all`",
        ],
        "columnOrder": [], "columnWidths": {}, "runsExpanded": {}, "runsPinned": [], "runsHidden": [],
        "runsVisibilityMap": {}, "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": _charts(names[:2]),
        "compareRunSections": [_section("even", "Even bits"), _section("layers", "Layers, by their index")],
        "viewMaximized": False, "runListHidden": False, "isAccordionReordered": True,
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {},
        "autoRefreshEnabled": False,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }  # fmt: skip


def _charts(names: Sequence[str]) -> list[dict[str, Any]]:
    parallel = {"selectedParams": ["budget", "label"], "selectedMetrics": ["bits.linear", *names]}
    charts = [_chart("PARALLEL", "even", 0, "budget, method, bits, quality", **parallel)]
    for number, name in enumerate(names, 1):
        axes = {"xaxis": {"key": "bits.linear", "type": "METRIC"}, "yaxis": {"key": name, "type": "METRIC"}}
        charts.append(_chart("SCATTER", "even", number, f"bits.linear against {name}", **axes))
    for number, curve in enumerate(CURVES):
        line = {
            "metricKey": curve, "selectedMetricKeys": [curve], "xAxisKey": "step", "yAxisKey": "metric",
            "scaleType": "linear" if curve.endswith("bits") else "log", "xAxisScaleType": "linear",
            "lineSmoothness": 0, "useGlobalXaxisKey": False, "range": {},
        }  # fmt: skip
        charts.append(_chart("LINE", "layers", number, f"{curve} by layer", **line))
    return charts


def _chart(kind: str, section: str, number: int, title: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": f"{KEY}-{section}-{number}", "type": kind, "metricSectionId": section, "deleted": False,
        "isGenerated": False, "runsCountToCompare": 100, "displayName": title, **more,
    }  # fmt: skip


def _section(key: str, title: str) -> dict[str, Any]:
    return {
        "uuid": key, "name": title, "display": True, "isReordered": True, "deleted": False, "isGenerated": False,
    }  # fmt: skip
