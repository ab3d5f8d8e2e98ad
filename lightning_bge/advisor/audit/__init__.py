"""What is really in effect in a training run, and what could still be gained."""
