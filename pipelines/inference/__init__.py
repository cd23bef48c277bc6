"""The job `infer`, which labels and embeds images, and the job `verify`, which checks an output.

manifest (rows) -> fetch (bytes) -> decode (uint8) -> predict (top-k, embedding) -> write (Parquet) -> commit
"""
