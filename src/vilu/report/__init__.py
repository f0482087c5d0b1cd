"""Results for people; the only package that draws."""
