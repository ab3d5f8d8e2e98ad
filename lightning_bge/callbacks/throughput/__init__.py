"""How fast training is: tokens per second, utilisation, padding."""
