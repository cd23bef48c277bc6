"""Storage: URIs, file systems, object-store clients, retries, bulk reads and conditional writes."""
