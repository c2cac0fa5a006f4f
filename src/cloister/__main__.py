"""`python -m cloister`."""

from cloister.cli import entry

entry()
