"""Harmless words of the frameworks are left out of our tools' output, and nothing else is."""

import logging
import sys
import warnings

from elsa_core.runtime.command_line import exit_status
from elsa_core.runtime.quiet import LOGGERS, HarmlessRecords, quiet_frameworks

HARMLESS = "torch.meshgrid: in an upcoming release, it will be required to pass indexing"
THEIRS = "Detected call of `lr_scheduler.step()` before `optimizer.step()`"


def speak(logger):
    for message in (HARMLESS, THEIRS):
        warnings.warn(message, UserWarning, stacklevel=1)
    logger.warning("is_fx_tracing will return true for both fx.symbolic_trace and torch.export.")
    logger.warning("a step was skipped")
    print("Could not import OneDL. Skipping OneDL datasets.")
    print("Could not import the data")
    print("one", "two", sep="\n")


def test_only_known_words_are_left_out(caplog, capsys):
    logger = logging.getLogger(LOGGERS[0])
    logger.propagate, kept = True, logger.propagate
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with quiet_frameworks():
            speak(logger)
        assert list(warnings.filters) == before and logger.filters == []
        assert [str(one.message) for one in caught] == [THEIRS]
        assert capsys.readouterr().out == "Could not import the data\none\ntwo\n"
        assert caplog.messages == ["a step was skipped"]
        speak(logger)
        assert len(caught) == 3 and "OneDL" in capsys.readouterr().out
    logger.propagate = kept


def test_commands_are_quiet_and_leave_standard_output_as_it_was(capsys):
    stream = sys.stdout

    def run():
        speak(logging.getLogger("elsa"))
        return 3

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert exit_status("tool", run) == 3
    assert [str(one.message) for one in caught] == [THEIRS]
    assert sys.stdout is stream and "OneDL" not in capsys.readouterr().out


def test_harmless_records_of_a_run():
    messages = ['"FileClient" will be deprecated in future.', "The metric is NaN"]
    records = [logging.LogRecord("mm", 30, "", 0, message, (), None) for message in messages]
    assert [HarmlessRecords().filter(record) for record in records] == [False, True]
