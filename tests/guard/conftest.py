"""Provide a finished triage to guard images with, and its folder with photos."""

from tests.triage.conftest import begun, changed, fake_model, folder, guaranteed, job

__all__ = ["begun", "changed", "fake_model", "folder", "guaranteed", "job"]
