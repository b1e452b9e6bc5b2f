"""Train and evaluate ELSA-Swin models in Detectron2, with Detectron2's own arguments."""

import sys
from pathlib import Path

# An installed copy goes first: it has the compiled operator, a bare clone may not.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from elsa_core.runtime.command_line import exit_status  # noqa: E402
from elsa_core.runtime.preemption import resume_hint  # noqa: E402

EXAMPLES = """\
examples:
  train on 8 GPUs            train_net.py --config-file FILE --num-gpus 8 OUTPUT_DIR DIR
  resume                     the same command with --resume
  evaluate                   train_net.py --config-file FILE --eval-only MODEL.WEIGHTS CHECKPOINT
  2 machines, on machine N   add --num-machines 2 --machine-rank N --dist-url tcp://HOST:PORT

"""


def command():
    from elsa_d2.engine.command import DETAILS, Command

    keys = {"device": "MODEL.DEVICE", "output": "OUTPUT_DIR", "weights": "MODEL.WEIGHTS"}
    description = "Train and evaluate ELSA-Swin models in Detectron2."
    return Command("train_net", description, EXAMPLES + DETAILS.format(**keys))


def main(arguments: list[str] | None = None) -> int:
    interrupted = "interrupted" + resume_hint("the last checkpoint")
    return exit_status("train_net", lambda: command().main(arguments), interrupted)


if __name__ == "__main__":
    sys.exit(main())
