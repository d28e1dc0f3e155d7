"""Aligning and differencing runs: numbers, no drawing, and no torch.

Stub of this module's docstring is completed below.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def read_curve(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, float_precision="round_trip")
