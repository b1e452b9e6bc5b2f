# DeepSpeed with ZeRO's stage 1: each process keeps a part of the optimizer's state. One more base
# of a leaf config of any toolbox; needs the package deepspeed and a launcher.
runner_type = "FlexibleRunner"
strategy = dict(type="ELSADeepSpeedStrategy", zero_optimization=dict(stage=1))
