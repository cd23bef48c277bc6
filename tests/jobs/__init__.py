"""Jobs run by their command lines."""
