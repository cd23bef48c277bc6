"""glibc malloc settings for processes that run a model on CPUs."""

# Every layer allocates and frees activations in blocks so large that glibc maps and unmaps each of them. On two cores,
# page faults then take a fifth of a forward pass. These settings make glibc keep freed memory. A single arena serves
# all threads, because the arena of the thread in which Ray runs a replica's calls could not grow large enough.
# Training steps become a twentieth faster.
KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
