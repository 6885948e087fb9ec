"""What is wrong with a results file."""
