"""Pure torch: modules, losses and the training loop; no files, no scikit-learn, no predictor."""
