"""Processes and Ray: job entry, logs, signals, the Ray session, nodes, metrics, caches."""
