"""More than one process: ranks, weights sharded with FSDP2, and the start of the processes."""
