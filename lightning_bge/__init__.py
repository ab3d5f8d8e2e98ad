"""The fastest way to fine-tune and tune BGE text encoders with PyTorch Lightning and Optuna."""

__version__ = "0.1.0"
