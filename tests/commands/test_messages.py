"""What libraries say while a command runs."""

import logging

import pytest

from fewstep.commands.messages import short_messages


def test_kernels_that_are_not_there_are_not_told_of_with_each_command(caplog: pytest.LogCaptureFixture) -> None:
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with short_messages():
        said.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'")
        said.error("this one is of use")
    said.warning("and this, outside")
    assert [record.message for record in caplog.records] == ["this one is of use", "and this, outside"]


def test_what_is_logged_is_cut_to_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with short_messages():
        logging.getLogger("diffusers").warning("a caption " * 200)
    assert len(caplog.records[0].message) < 400
    assert caplog.records[0].message.startswith("a caption a caption")
