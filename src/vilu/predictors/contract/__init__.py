"""What all predictors have in common: their base class, parameters, and record of fitted rows."""
