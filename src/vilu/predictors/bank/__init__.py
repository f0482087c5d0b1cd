"""Methods that learn their classes from labelled images."""
