"""Means and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t interval: (mean, low, high); NaN bounds for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, df=len(values) - 1)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def intervals(columns: Mapping[str, Sequence[float]], name: str) -> pd.DataFrame:
    """One row for each column of values: their mean, called `name`, and its 95% t interval, `low` and `high`."""
    rows = {
        row: dict(zip((name, "low", "high"), mean_interval(values), strict=True)) for row, values in columns.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")
