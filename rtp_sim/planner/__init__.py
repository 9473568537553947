"""The planner: which layout, how many partitions, on which hardware, and what if something of it were different."""
