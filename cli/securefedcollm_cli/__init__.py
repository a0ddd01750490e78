"""The command line of securefedcollm: parse, call, render; nothing else."""
