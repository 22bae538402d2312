"""The estimator lab: toy problems, gradients of trained runs, costs, comparisons and their report."""
