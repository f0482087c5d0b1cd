"""Parts common to all predictors: base class, parameters, and records of fitted rows."""
