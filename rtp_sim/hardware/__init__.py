"""Hardware: what a cluster is made of, how it is wired, and what its profiles say."""
