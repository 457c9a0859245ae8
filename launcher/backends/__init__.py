"""How agents are started on nodes, one file a backend: this machine, ssh, Slurm, PBS, or nodes that join by themselves."""
