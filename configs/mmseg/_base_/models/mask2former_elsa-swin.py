# The model of the recipe alone, for other data: bases of a config must have different keys.
custom_imports = dict(imports=["elsa_mm", "mmdet.models"])
model = (
    __import__("mmengine")
    .Config.fromfile("{{ fileDirname }}/../recipes/mask2former_ade20k.py")
    .model
)
