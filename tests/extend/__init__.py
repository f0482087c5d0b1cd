"""Test extensions from outside the package, as another author writes them."""
