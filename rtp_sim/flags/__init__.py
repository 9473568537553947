"""The flags of the command line: values, groups that several commands share, and each command's own.

Nothing here is slow to import, so that --help and a mistyped flag answer at once.
"""
