"""Methods that know their classes from labelled images."""
