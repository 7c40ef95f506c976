"""The tests have the signals that they rely on, however they were started."""

import signal
import subprocess
import sys

import pytest
from toys.places import TESTS


@pytest.mark.takes_seconds
def test_tests_that_were_started_in_the_background_hear_ctrl_c():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import conftest, subprocess, sys;"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler);"
        "subprocess.run([sys.executable, '-c', "
        "'import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)'])"
    )
    done = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, cwd=TESTS, check=True)
    assert done.stdout.split() == ["True", "True"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
