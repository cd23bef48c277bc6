"""Where bytes live: URIs, file systems, bulk reads, listing, and the manifest."""
