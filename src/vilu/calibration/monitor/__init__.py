"""Does the guarantee still hold for the rows that come in."""
