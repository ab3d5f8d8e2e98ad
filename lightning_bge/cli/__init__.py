"""The command line: `lightning-bge`, one module for each command."""
