"""An output directory: file names, run record, writer, commit log, lease, compaction."""
