"""The agent: the process on each node that runs torch elastic for its ranks and reads the node's CPUs, memory and GPUs."""
