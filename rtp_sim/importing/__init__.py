"""Measurements of other programs turned into a cluster profile: what the importers read, fitted and written."""
