"""What a study does when its trials have ended: comparisons, the exported model, and the results."""
