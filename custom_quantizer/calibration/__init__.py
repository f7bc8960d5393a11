"""From data to ranges: observers, statistics, running data through a prepared graph."""
