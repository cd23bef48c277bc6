"""Inputs: listing them, the manifest that pins them, class folders and lists."""
