"""Local cluster for tests and demos: object store, Ray head, sample data, faulty proxy."""
