"""Comparisons, sweeps, studies and the benchmark: many runs, made once, stored with their provenance, and compared."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"  # long results that come with the package
