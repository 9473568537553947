"""Steps put together from stretches: what repeats is timed once, exactly, and composed as often as it occurs."""
