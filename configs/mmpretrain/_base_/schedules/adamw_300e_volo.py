# VOLO's schedule is ELSA-Swin's without clipping; 1e-3 is the rate of D2 and D3. The constructor
# of the parameter groups knows the position embedding and the class token, which are not decayed.
_base_ = ["adamw_300e.py"]

optim_wrapper = dict(clip_grad=None)
