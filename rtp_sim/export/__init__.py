"""A plan said in the words of what carries it out: this program's own command, and frameworks' settings."""
