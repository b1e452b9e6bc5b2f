"""Every command in tools/ explains itself."""

import pytest
from docs_blocks import REPOSITORY, show_help

NEEDS = {
    "train_net": "detectron2",
    "lazyconfig_train_net": "detectron2",
    "train": "mmengine",
    "test": "mmengine",
}
TOOLS = sorted(path.stem for path in (REPOSITORY / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", [name for name in TOOLS if name != "environments"])
def test_help(tool):
    """In this process, where the frameworks are imported once for all."""
    if tool in NEEDS:
        pytest.importorskip(NEEDS[tool])
    status, text = show_help(tool)
    assert status == 0 and text.startswith(f"usage: {tool}.py [-h]")
    assert len(text.splitlines()) > 4
