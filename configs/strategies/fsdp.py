# PyTorch's FSDP: each process keeps a part of the parameters, gradients and optimizer state. One
# more base of a leaf config of any toolbox; needs a launcher.
runner_type = "FlexibleRunner"
strategy = dict(type="ELSAFSDPStrategy")
