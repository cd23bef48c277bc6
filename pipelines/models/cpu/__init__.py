"""Optimizations for CPUs: packed and Winograd convolutions, int8 quantization, compiled programs."""
