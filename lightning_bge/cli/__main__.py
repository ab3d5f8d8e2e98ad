"""`python -m lightning_bge.cli`, which torchrun and other launchers start."""

from lightning_bge.cli.main import main

if __name__ == "__main__":
    main()
