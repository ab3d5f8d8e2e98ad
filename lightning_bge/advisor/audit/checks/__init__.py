"""One rule for each row of an audit."""
