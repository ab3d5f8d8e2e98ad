"""The commands: each module is named after one, and has a function `run(args)`."""
