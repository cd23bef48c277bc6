"""Jobs on several hosts, which are Linux namespaces on one machine."""
