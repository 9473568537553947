"""Predicted against measured: joins two timelines of one schedule, and judges a measured run against a prediction."""
