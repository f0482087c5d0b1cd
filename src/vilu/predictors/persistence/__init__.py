"""How predictors are saved, loaded, shared and exported."""
