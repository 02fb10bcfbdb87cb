"""The expensive passes of a run, with their keys and prices."""
