"""The metrics of each task, the one that a run monitors, and decision thresholds."""
