"""Pure functions from metrics to figures; the only place that imports plotly."""
