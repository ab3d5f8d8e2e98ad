"""The report of a run as an HTML page, and its status as text."""
