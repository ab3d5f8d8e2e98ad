"""Which trial a process runs next, and how it runs one after another."""
