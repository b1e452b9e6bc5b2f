"""Rules for annotation files, images and label maps, shared by all commands and frameworks."""
