"""Looking inside: what a model is made of, and what ELSA attends to in an image."""
