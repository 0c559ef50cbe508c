import signal

import pytest


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """Training in this process catches signals; the tests after it do not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
