"""Experiment trackers (MLflow, Weights & Biases, TensorBoard): a run for each trial of a study."""
