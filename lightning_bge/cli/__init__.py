"""The command line: `lightning-bge`."""
