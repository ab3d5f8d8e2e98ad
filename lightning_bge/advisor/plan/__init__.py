"""The hours of a study before they are spent."""
