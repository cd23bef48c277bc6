"""Inputs of a job: readers, listings, the manifest that pins them, class folders and lists."""
