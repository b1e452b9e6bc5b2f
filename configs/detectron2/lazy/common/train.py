"""How tools/lazyconfig_train_net.py trains: 12 epochs of COCO, evaluated and saved each epoch.

The keys of Detectron2's own common/train.py, and ours.
"""

from elsa_core.ema import DECAY, WARMUP
from elsa_core.runtime.finite import MAX_NONFINITE
from elsa_core.runtime.trackers import PROJECT

train = dict(
    output_dir="output",
    init_checkpoint="",
    max_iter=12 * 7330,
    amp=dict(enabled=True, dtype=""),  # "": float16 on CUDA, bfloat16 elsewhere
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=7330),
    eval_period=7330,
    log_period=20,
    device="cuda",
    seed=-1,
    # Parts of a batch that go through the model one after the other.
    accumulate_steps=1,
    # Of the norm of all gradients together.
    clip_grad=dict(enabled=False, max_norm=1.0),
    # Non-finite losses or gradients in a row that end a training.
    max_nonfinite=MAX_NONFINITE,
    # Moving averages of the weights, evaluated beside the weights.
    ema=dict(enabled=False, decay=DECAY, warmup=WARMUP),
    # A metric, such as "segm/AP" or "ema/segm/AP": its best checkpoint is kept as model_best.pth.
    best_metric="",
    # The training ends after this many evaluations in a row without a metric that is higher by more
    # than min_delta; 0: never.
    patience=0,
    min_delta=0.0,
    # Where the scalars go besides: "tensorboard", "wandb", "mlflow"; and the project there.
    writers=["tensorboard"],
    project=PROJECT,
)
