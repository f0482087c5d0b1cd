"""A triage to guard images with: its folder of photos, and what it has left."""

from tests.triage.conftest import begun, changed, fake_model, folder, guaranteed, job

__all__ = ["begun", "changed", "fake_model", "folder", "guaranteed", "job"]
