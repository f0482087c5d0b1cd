"""What every predictor has: the contract, its parameters, the rows that it learns from and knows again."""
