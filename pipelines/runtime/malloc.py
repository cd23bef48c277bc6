"""glibc's memory, for processes that run a model on CPUs."""

# Activations are freed and allocated anew by every layer, in blocks so large that glibc maps each of them and hands it
# back: on two cores, a fifth of a forward pass is page faults. With these glibc keeps what is freed, in one arena for
# all threads (Ray runs a replica's calls in a thread of its own, whose arena could not grow as large). Training steps
# gain a twentieth.
KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
