"""Every method on several data sets, over seeds, label budgets and transfer. Runs can resume."""
