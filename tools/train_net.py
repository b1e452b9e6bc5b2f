"""Train and evaluate ELSA-Swin models in Detectron2, with Detectron2's own arguments."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

# An installed copy goes first: it has the compiled operator, a bare clone may not.
sys.path.append(str(Path(__file__).resolve().parents[1]))

DETAILS = """\
examples:
  train on 8 GPUs            train_net.py --config-file FILE --num-gpus 8 OUTPUT_DIR DIR
  resume                     the same command with --resume
  evaluate                   train_net.py --config-file FILE --eval-only MODEL.WEIGHTS CHECKPOINT
  2 machines, on machine N   add --num-machines 2 --machine-rank N --dist-url tcp://HOST:PORT

Without CUDA, training runs on the CPU, whatever MODEL.DEVICE is; --num-gpus 2 then starts two
processes, which divide the batch and the cores, and exchange gradients through gloo. --dist-url
auto finds a free port on one machine.

--resume needs a checkpoint in OUTPUT_DIR; without one, training starts from MODEL.WEIGHTS and the
log says so. Losses (every 20 iterations) and metrics are in OUTPUT_DIR/metrics.json.

SIGTERM and SIGUSR1, which schedulers send before they kill, save the state at the next iteration
and end the training; --resume continues from there.

exit status: 0 success, 1 failure, 2 wrong use or a damaged file (one sentence on standard error),
130 interrupted, 143 or 138 a training stopped by SIGTERM or SIGUSR1, with its state saved
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=DETAILS)
    parser.prog = "train_net.py"
    parser.description = "Train and evaluate ELSA-Swin models in Detectron2."
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict | None:
    """Runs in each process; returns the metrics of an evaluation."""
    from elsa_core.runtime.lock import TrainingLock
    from elsa_core.runtime.quiet import quiet_frameworks
    from elsa_d2 import load_config

    with quiet_frameworks():
        if options.eval_only:
            return train_or_evaluate(options)
        with TrainingLock(load_config(options.config_file, options.opts).OUTPUT_DIR):
            return train_or_evaluate(options)


def train_or_evaluate(options: argparse.Namespace) -> dict | None:
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from elsa_core.runtime.preemption import TrainingEnded
    from elsa_core.weights import class_names
    from elsa_d2 import AtomicCheckpointer, load_config, register_coco_datasets, trainer_class
    from elsa_d2.data.cityscapes import register_cityscapes_datasets
    from elsa_d2.data.classes import usable
    from elsa_d2.data.sem_seg import register_sem_seg_datasets
    from elsa_d2.engine.trainer import share_cpu_cores, use_available_device

    cfg = load_config(options.config_file, options.opts)
    for name in ("elsa_d2", "elsa_core"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    use_available_device(cfg)
    cfg.freeze()
    default_setup(cfg, options)
    register_sem_seg_datasets(cfg)
    register_cityscapes_datasets(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        share_cpu_cores()
    trainer_type = trainer_class(cfg)
    if options.eval_only:
        model = trainer_type.build_model(cfg)
        checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        rest = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=options.resume)
        register_coco_datasets(cfg, usable(cfg, class_names(rest)[0]))
        results = trainer_type.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer_type.test_with_tta(cfg, model))
        return results
    register_coco_datasets(cfg)
    trainer = trainer_type(cfg)
    trainer.resume_or_load(resume=options.resume)
    try:
        return trainer.train()
    except TrainingEnded as end:
        if comm.is_main_process():
            report(end.sentence)
        raise


def main(arguments: list[str] | None = None) -> int:
    try:
        from elsa_core.runtime.quiet import quiet_frameworks

        with quiet_frameworks():
            options = parse_arguments(arguments)
            from detectron2.engine import launch
            from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

            from elsa_core.runtime.errors import sentence_in
            from elsa_core.runtime.preemption import TrainingEnded, forward_to_children
            from elsa_d2 import UsageError, load_config
            from elsa_d2.engine.preflight import check_run
    except ModuleNotFoundError as error:
        from elsa_core.runtime.packages import missing

        return fail(missing([error.name]))
    try:
        with quiet_frameworks():
            check_run(
                load_config(options.config_file, options.opts),
                eval_only=options.eval_only,
                resume=options.resume,
                processes=options.num_gpus,
                machines=options.num_machines,
            )
        alone = options.num_gpus * options.num_machines == 1
        with nullcontext() if alone else forward_to_children():
            launch(
                run,
                options.num_gpus,
                options.num_machines,
                options.machine_rank,
                options.dist_url,
                args=(options,),
            )
    except UsageError as error:
        return fail(str(error))
    except ProcessRaisedException as error:
        if sentence := sentence_in(str(error)):
            return fail(sentence)
        raise
    except TrainingEnded as end:
        return end.code
    except ProcessExitedException as error:  # the sentence is that of its main process
        if error.exit_code < 0:
            name = error.signal_name
            report(f"a process was killed by {name}; --resume continues from the last checkpoint")
            return 128 - error.exit_code
        return error.exit_code
    except KeyboardInterrupt:
        fail("interrupted; --resume continues from the last checkpoint")
        return 130
    return 0


def fail(sentence: str) -> int:
    report(sentence)
    return 2


def report(sentence: str) -> None:
    print(f"train_net: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
