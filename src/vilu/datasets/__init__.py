"""What to embed: encoded images with their labels; the only package that knows files of images."""
