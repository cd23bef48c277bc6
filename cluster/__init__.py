"""Where the jobs run: this machine, and the files for clusters."""
