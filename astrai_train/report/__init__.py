"""What a run was, as one page and as numbers: `report.html` and `report.json` in its folder."""

from astrai_train.report.history import History
from astrai_train.report.page import render, write_report

__all__ = ["History", "render", "write_report"]
