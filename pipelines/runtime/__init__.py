"""Processes and Ray: job entry point, logging, signals, Ray session, nodes, metrics and caches."""
