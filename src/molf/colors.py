"""Colours of experts and methods in drawings, distinguishable without red-green vision."""

COLORS = ("#d55e00", "#0072b2", "#009e73", "#b0568e", "#8a7a00", "#4b9cd3")
EMPTY = "#ebedf0"
