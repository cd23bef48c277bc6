"""A cluster on one machine: object store, Ray head, sample data, a faulty proxy, the demo."""
