"""Runs schedules with torch: kernels, parameters, one rank's machine, and the references that say what is right."""
