"""Train and evaluate detectors that a LazyConfig describes, with Detectron2's own arguments."""

import sys
from pathlib import Path

# An installed copy goes first: it has the compiled operator, a bare clone may not.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from elsa_core.runtime.command_line import exit_status  # noqa: E402
from elsa_core.runtime.preemption import resume_hint  # noqa: E402

NAME = "lazyconfig_train_net"
EXAMPLES = f"""\
examples ({NAME}.py):
  train on 8 GPUs            --config-file FILE --num-gpus 8 train.output_dir=DIR
  resume                     the same command with --resume
  evaluate                   --config-file FILE --eval-only train.init_checkpoint=CHECKPOINT
  2 machines, on machine N   add --num-machines 2 --machine-rank N --dist-url tcp://HOST:PORT

A LazyConfig is a program: run only those that you trust.

"""


def command():
    from elsa_d2.engine.command import DETAILS, Command
    from elsa_d2.engine.lazy_trainer import lazy_run
    from elsa_d2.lazy import KEYS, in_words_of_lazy_config

    keys = {"device": "MODEL.DEVICE", "output": "OUTPUT_DIR", "weights": "MODEL.WEIGHTS"}
    details = DETAILS.format(**{name: KEYS[key] for name, key in keys.items()})
    description = "Train and evaluate detectors that a LazyConfig describes."
    return Command(NAME, description, EXAMPLES + details, lazy_run, in_words_of_lazy_config)


def main(arguments: list[str] | None = None) -> int:
    interrupted = "interrupted" + resume_hint("the last checkpoint")
    return exit_status(NAME, lambda: command().main(arguments), interrupted)


if __name__ == "__main__":
    sys.exit(main())
