"""ECA ResNets on Ray: the library behind the jobs."""
