"""What a finished or running study has done, read from its run folder."""
