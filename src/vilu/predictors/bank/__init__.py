"""Methods that learn classes from labelled images."""
