"""pytest --card cuda: the whole session has a pretended card, which whatever is automatic chooses.

At the end it says which tests used the card, what they left on it, and where a copy may be read
before it has arrived; with --card-waits, also where the host waited.
"""

from collections import Counter
from contextlib import ExitStack

import pytest

from . import Card, pretend_card, why_not

CARD = pytest.StashKey[Card]()
STACK = pytest.StashKey[ExitStack]()
SEEN = pytest.StashKey["Seen"]()


class Seen:
    """Over all tests: name -> how often, or how much."""

    def __init__(self):
        self.used: list[str] = []
        self.left: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.hazards: Counter[str] = Counter()


def pytest_addoption(parser):
    group = parser.getgroup("pretended card")
    group.addoption("--card", metavar="DEVICE", help="open a card for the session: cuda, cuda:1")
    group.addoption("--card-memory", type=float, default=8.0, metavar="GIB", help="default: 8")
    group.addoption("--card-capability", default="8.9", metavar="X.Y", help="default: 8.9")
    group.addoption("--comfyui-flags", help="as main.py takes them, such as --novram")
    group.addoption("--card-waits", action="store_true", help="tell where the host waited")


@pytest.hookimpl(tryfirst=True)  # before tests/nodes/conftest.py starts ComfyUI
def pytest_configure(config):
    device = config.getoption("--card")
    if not device:
        return
    if why_not():
        raise pytest.UsageError(why_not())
    major, minor = map(int, config.getoption("--card-capability").split("."))
    stack = config.stash[STACK] = ExitStack()
    opened = pretend_card(
        config.getoption("--card-memory"), device=device, capability=(major, minor)
    )
    config.stash[CARD] = stack.enter_context(opened)
    config.stash[SEEN] = Seen()


def pytest_unconfigure(config):
    if STACK in config.stash:
        config.stash[STACK].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    card = item.config.stash.get(CARD, None)
    if card is None:
        return (yield)
    seen, before, live = item.config.stash[SEEN], card.counts.copy(), card.live
    result = yield
    part = card.counts.since(before)
    if part.launches:
        seen.used.append(item.nodeid)
        seen.waits += part.waits
        seen.hazards += part.hazards
        if card.live > live:
            seen.left[item.nodeid] += card.live - live
    return result


def pytest_terminal_summary(terminalreporter, config):
    if SEEN not in config.stash:
        return
    seen, write = config.stash[SEEN], terminalreporter.write_line
    write(f"tests that used {config.stash[CARD].device}: {len(seen.used)}")
    for test, size in seen.left.most_common(10):
        write(f"  left {size / 2**20:.2f} MiB on it: {test}")
    for what, times in seen.hazards.most_common(40):
        write(f"  hazard, {times} times: {what}")
    if config.getoption("--card-waits"):
        for what, times in seen.waits.most_common(150):
            write(f"  {times:6d} waits: {what}")
