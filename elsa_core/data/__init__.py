"""The rules of annotation files, images and label maps, one for all commands and frameworks."""
