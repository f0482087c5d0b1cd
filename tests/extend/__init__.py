"""Things from outside of the package, as a stranger writes them."""
