"""What a trained model gives: predictions, calibrated scores, files and exported folders."""
