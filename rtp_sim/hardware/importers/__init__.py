"""Importers: what `nvidia-smi topo -m` and nccl-tests print, read as plain data. They parse and nothing else."""
