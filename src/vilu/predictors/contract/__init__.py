"""The common parts of all predictors: base class, parameters, and record of fitted rows."""
