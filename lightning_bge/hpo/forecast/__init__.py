"""What a pruner will do and how long a study will take, by simulation."""
