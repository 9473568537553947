"""Traces of PyTorch's profiler (Kineto), read without torch: whose kernels took how long, and when ops of ours ran."""
