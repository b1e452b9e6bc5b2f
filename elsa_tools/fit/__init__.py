"""From a folder of annotated images to a trained model: ``elsa fit``."""
