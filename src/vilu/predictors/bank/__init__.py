"""Predictors that compare an image with labelled training images."""
