"""What a trial does: its folds, what it reports, and what it leaves on the disk."""
