"""Deployment: configuration of clusters, and a local cluster for tests and demos."""
