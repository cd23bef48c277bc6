"""Models on CPUs: packed and Winograd convolutions, int8, compiled code."""
