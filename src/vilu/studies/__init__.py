"""From the finished cells of benchmarks to tables, figures, claims, and a document."""
