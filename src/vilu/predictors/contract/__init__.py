"""What every predictor has: the contract, its parameters, and a memory of the rows of its fit."""
