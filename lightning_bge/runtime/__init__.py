"""What every package needs of the machine: memory, run folders, configuration, processes."""
