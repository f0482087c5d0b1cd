"""Refusing views and claims that could not be made of the results, before anything has run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vilu.benchmark.parts import Names, require_known
from vilu.benchmark.presentation import (
    AnyClaim,
    AnyView,
    Better,
    CurveView,
    GridView,
    RankingView,
    ScatterView,
    Steeper,
    TableView,
    Trend,
    View,
)
from vilu.benchmark.resampling import RANKED_BY

if TYPE_CHECKING:
    from vilu.benchmark.config import Config


def check_views(config: Config) -> None:
    """Refuse views that name what is not there, or could not be shown.

    Raises:
        ValueError: Naming the view.
    """
    twice = [name for name, count in Counter(view.name for view in config.views).items() if count > 1]
    if twice:
        raise ValueError(f"two views are called {twice[0]}, and would be one file")
    for view in config.views:
        where = f"(view {view.name})"
        _require_names(config, view, where)
        _require_showable(config, view, where)


def _require_showable(config: Config, view: AnyView, where: str) -> None:
    match view:
        case CurveView():
            require_known(f"metric with an interval {where}", view.metrics, RANKED_BY)
            if all(x is None for x in _places(config, view)):
                raise ValueError(f"no {view.x} has an x to stand on the axis {where}")
        case ScatterView():
            require_known(f"metric with an interval {where}", view.metrics, RANKED_BY)
        case GridView():
            require_known(f"metric with an interval {where}", view.metrics[:1], RANKED_BY)
            require_known(f"setting {where}", (view.select_on, view.report_on), config.settings)
        case RankingView() if view.methods or view.data or view.settings or view.metrics != RANKED_BY:
            raise ValueError(f"a ranking is of everything, so there is nothing to choose {where}")
        case TableView():
            require_known(f"data set {where}", view.mean, config.data)
            _require_fields(config, view)


def check_claims(config: Config) -> None:
    """Refuse claims that name what is not there, or could not be decided.

    Raises:
        ValueError: Naming what is wrong.
    """
    for claim in config.claims:
        require_known("data set (claim)", claim.data or (), config.data)
        require_known("metric (claim)", [claim.metric], RANKED_BY)
        methods, settings = _subjects(claim)
        require_known("method (claim)", methods, config.entries)
        require_known("setting (claim)", settings, config.settings)
        if isinstance(claim, Trend):
            x = [config.settings[name].x for name in settings]
            if any(value is None or value <= 0 for value in x) or len(set(x)) < 2:
                raise ValueError(f"the trend of {claim.method} needs settings with different x above zero")


def _require_names(config: Config, view: View, where: str) -> None:
    require_known(f"method {where}", view.methods or (), config.entries)
    require_known(f"data set {where}", view.data or (), config.data)
    require_known(f"setting {where}", view.settings or (), config.settings)
    require_known(f"metric {where}", view.metrics, config.metrics)


def _places(config: Config, view: CurveView) -> Iterable[float | None]:
    match view.x:
        case "method":
            return [config.entries[name].x for name in view.methods or config.entries]
        case "data":
            return [config.data[name].x for name in view.data or config.data]
        case "setting":
            return [config.settings[name].x for name in view.settings or config.settings]


def _require_fields(config: Config, view: TableView) -> None:
    """Refuse a table in which two numbers would stand in one cell."""
    several = {
        "method": view.methods or tuple(config.entries),
        "data": view.data or tuple(config.data),
        "setting": view.settings or tuple(config.settings),
        "metric": view.metrics,
    }
    for field, names in several.items():
        if field not in (*view.rows, *view.columns) and len(names) > 1:
            raise ValueError(
                f"the view {view.name} has several values of {field} ({', '.join(names)}), and neither rows nor "
                "columns name it"
            )


def _subjects(claim: AnyClaim) -> tuple[Names, Names]:
    """Methods and settings that a claim is about."""
    match claim:
        case Better():
            both = claim.better, claim.than
            return tuple(subject.method for subject in both), tuple(subject.setting for subject in both)
        case Trend():
            return (claim.method,), claim.settings
        case Steeper():
            return (claim.steeper, claim.than), claim.settings
