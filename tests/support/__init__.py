"""Helpers, sample files and stand-ins that the tests share."""
