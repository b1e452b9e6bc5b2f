"""The command line that trains and evaluates, for both kinds of configs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from elsa_core.runtime.command_line import say
from elsa_core.runtime.errors import UsageError, sentence_in
from elsa_core.runtime.lock import TrainingLock
from elsa_core.runtime.preemption import TrainingEnded, forward_to_children
from elsa_core.runtime.quiet import quiet_frameworks
from elsa_core.weights import class_names
from elsa_d2.checkpoint import AtomicCheckpointer
from elsa_d2.config import load_config
from elsa_d2.data.cityscapes import register_cityscapes_datasets
from elsa_d2.data.classes import usable
from elsa_d2.data.coco import register_coco_datasets
from elsa_d2.data.sem_seg import register_sem_seg_datasets

from .preflight import check_run
from .sem_seg_trainer import trainer_class
from .trainer import Trainer, share_cpu_cores, use_available_device

DETAILS = """\
Without CUDA, training runs on the CPU, whatever {device} is; --num-gpus 2 then starts two
processes, which divide the batch and the cores, and exchange gradients through gloo. --dist-url
auto finds a free port on one machine.

--resume needs a checkpoint in {output}; without one, training starts from {weights} and
the log says so. Losses (every 20 iterations) and metrics are in metrics.json of that folder.

SIGTERM and SIGUSR1, which schedulers send before they kill, save the state at the next iteration
and end the training; --resume continues from there.

exit status: 0 success, 1 failure, 2 wrong use or a damaged file (one sentence on standard error),
130 interrupted, 143 or 138 a training stopped by SIGTERM or SIGUSR1, with its state saved
"""


def yaml_run(config_file: str, overrides: list[str]) -> tuple[CfgNode, type[Trainer]]:
    """Returns the config of a YAML file, and its trainer."""
    cfg = load_config(config_file, overrides)
    return cfg, trainer_class(cfg)


@dataclass(frozen=True)
class Command:
    """A tool with Detectron2's arguments.

    Args:
        name: of the tool, with which its sentences begin.
        description, details: for --help.
        read: returns the config and the trainer for a config file and overrides.
        words: replaces the names of config keys in a sentence.
    """

    name: str
    description: str
    details: str
    read: Callable[[str, list[str]], tuple[CfgNode, type[Trainer]]] = yaml_run
    words: Callable[[str], str] = str

    def parse_arguments(self, arguments: list[str] | None) -> argparse.Namespace:
        parser = default_argument_parser(epilog=self.details)
        parser.prog, parser.description = f"{self.name}.py", self.description
        return parser.parse_args(arguments)

    def run(self, options: argparse.Namespace) -> dict | None:
        """Runs in each process; returns the metrics of an evaluation."""
        with quiet_frameworks():
            if options.eval_only:
                return self._train_or_evaluate(options)
            cfg, _ = self.read(options.config_file, options.opts)
            with TrainingLock(cfg.OUTPUT_DIR):
                return self._train_or_evaluate(options)

    def _train_or_evaluate(self, options: argparse.Namespace) -> dict | None:
        cfg, trainer_type = self.read(options.config_file, options.opts)
        for name in ("elsa_d2", "elsa_core"):
            setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
        use_available_device(cfg)
        cfg.freeze()
        default_setup(trainer_type.describe(cfg), options)
        register_sem_seg_datasets(cfg)
        register_cityscapes_datasets(cfg)
        if cfg.MODEL.DEVICE == "cpu":
            share_cpu_cores()
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
                say(self.name, self.words(end.sentence))
            raise

    def main(self, arguments: list[str] | None = None) -> int:
        """Returns the exit status; raises UsageError for what the user can fix."""
        options = self.parse_arguments(arguments)
        try:
            cfg, trainer_type = self.read(options.config_file, options.opts)
            check_run(
                cfg,
                parts=trainer_type.check_parts,
                eval_only=options.eval_only,
                resume=options.resume,
                processes=options.num_gpus,
                machines=options.num_machines,
            )
            alone = options.num_gpus * options.num_machines == 1
            with nullcontext() if alone else forward_to_children():
                launch(
                    self.run,
                    options.num_gpus,
                    options.num_machines,
                    options.machine_rank,
                    options.dist_url,
                    args=(options,),
                )
        except UsageError as error:
            raise UsageError(self.words(str(error))) from error
        except ProcessRaisedException as error:
            if sentence := sentence_in(str(error)):
                raise UsageError(self.words(sentence)) from error
            raise
        except TrainingEnded as end:
            return end.status
        except ProcessExitedException as error:  # the sentence is that of its main process
            if error.exit_code < 0:
                killed = f"a process was killed by {error.signal_name}"
                say(self.name, f"{killed}; --resume continues from the last checkpoint")
                return 128 - error.exit_code
            return error.exit_code
        return 0
