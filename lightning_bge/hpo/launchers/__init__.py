"""The processes of a study: started on this machine or on a Ray cluster, replaced when they die, stopped together."""
