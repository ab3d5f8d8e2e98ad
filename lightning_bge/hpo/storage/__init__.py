"""The journal of a study, which processes run its trials, and what is done about those that died."""
