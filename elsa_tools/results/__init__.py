"""Results by class: what a trained model gets right and wrong, as numbers, tables and pictures."""
