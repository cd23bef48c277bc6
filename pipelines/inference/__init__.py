"""Labelling and embedding: `run.py` is the chain, one module a stage.

manifest (what) -> fetch (bytes) -> decode (uint8) -> predict (top-k, embedding) -> write (Parquet) -> commit
"""
