"""The engines: when every op of a schedule starts and ends, given a cost model."""
