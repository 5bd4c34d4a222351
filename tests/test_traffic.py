"""What is remembered of a site's links, and who has to wait."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from caxev import program
from caxev.config import Link
from caxev.transfer.traffic import Traffic

MANY = 1 << 30


def test_the_order_counts_where_nothing_is_known() -> None:
    """As sites.json has it; and a little faster is not enough to change that."""
    traffic = Traffic()
    assert traffic.order(["a", "b", "c"]) == ["a", "b", "c"]
    traffic.note("a", MANY, 10.0)
    traffic.note("b", MANY, 9.0)
    assert traffic.order(["a", "b", "c"]) == ["a", "b", "c"]


def test_a_much_faster_source_comes_first() -> None:
    """What was moved lately tells; trifles do not."""
    traffic = Traffic()
    traffic.note("a", MANY, 100.0)
    traffic.note("b", 1000, 0.000_001)
    assert traffic.order(["b", "a"]) == ["b", "a"]
    for _ in range(5):
        traffic.note("b", MANY, 10.0)
    assert traffic.order(["a", "b"]) == ["b", "a"]
    assert traffic.order(["a"]) == ["a"]


async def test_a_busy_link_is_passed_by() -> None:
    """Two transfers from the first, and the second is worth as much."""
    traffic = Traffic()
    async with traffic.slot("a", Link()), traffic.slot("a", Link()):
        assert traffic.order(["a", "b"]) == ["b", "a"]
    assert traffic.order(["a", "b"]) == ["a", "b"]


async def test_those_that_wait_are_load_as_well() -> None:
    """Of many that come at once not all queue for the first source while the second is idle."""
    traffic, link = Traffic(), Link(transfers=1)
    chosen: list[str] = []

    async def move() -> None:
        name, _ = traffic.order(["a", "b"])
        async with traffic.slot(name, link):
            chosen.append(name)
            await wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(move)
    assert Counter(chosen) == {"a": 6, "b": 4}


@pytest.mark.parametrize(
    ("link", "most", "rate"),
    [
        (Link(transfers=2), 2, None),
        (Link(max_rate=8e6), 1, 8e6),
        (Link(max_rate=8e6, transfers=2), 2, 4e6),
    ],
)
async def test_a_link_has_so_many_places(link: Link, most: int, rate: float | None) -> None:
    """Others wait until one is free, and what is allowed in a second is shared out."""
    traffic = Traffic()
    inside: list[int] = []
    count = 0

    async def move() -> None:
        nonlocal count
        async with traffic.slot("a", link) as mine:
            assert mine == rate
            count += 1
            inside.append(count)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            count -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(move)
    assert len(inside) == 7
    assert max(inside) == most


def test_one_that_waits_gives_a_sign_of_life_each_minute() -> None:
    """As long as there is no place, and not once it has one."""
    signs: list[float] = []

    async def main() -> None:
        traffic, link, begin = Traffic(), Link(transfers=1), trio.current_time()

        async def wait() -> None:
            sign = lambda: signs.append(trio.current_time() - begin)  # noqa: E731
            async with traffic.slot("a", link, waiting=sign):
                await trio.sleep(600)

        async with trio.open_nursery() as nursery, traffic.slot("a", link):
            nursery.start_soon(wait)
            await trio.sleep(150)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert signs == [0, 60, 120]


async def test_the_most_urgent_is_next() -> None:
    """By priority, then the newest; of equals who came first. All that wait stand aside."""
    traffic, link = Traffic(), Link(transfers=1)
    order: list[tuple[int, int]] = []
    aside: list[int] = []

    @contextmanager
    def stand() -> Iterator[None]:
        aside.append(1)
        yield
        aside.pop()

    async def move(urgency: tuple[int, int]) -> None:
        async with traffic.slot("a", link, urgency=urgency, aside=stand):
            order.append(urgency)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, traffic.slot("a", link, aside=stand):
        for urgency in ((0, 1), (0, 3), (5, 2), (0, 2)):
            nursery.start_soon(move, urgency)
        await wait_all_tasks_blocked()
        assert len(aside) == 4
    assert order == [(5, 2), (0, 3), (0, 2), (0, 1)]
    assert aside == []


async def test_one_that_is_cancelled_while_it_waits_takes_no_place() -> None:
    """The place that is free then is another's."""
    traffic, link = Traffic(), Link(transfers=1)
    async with traffic.slot("a", link):
        with trio.CancelScope() as scope:
            scope.cancel()
            async with traffic.slot("a", link):
                raise AssertionError("unreachable")
    async with traffic.slot("a", link):
        assert traffic._active["a"] == 1
    assert traffic._active["a"] == 0


def test_a_site_where_transfers_fail_comes_last_for_a_while() -> None:
    """However fast it is, for ten minutes from its last failure."""
    clock = MockClock()

    async def main() -> None:
        traffic = Traffic()
        traffic.note("a", MANY, 1.0)
        traffic.failed("a")
        assert traffic.order(["a", "b", "c"]) == ["b", "c", "a"]
        clock.jump(400)
        traffic.failed("a")
        clock.jump(400)
        assert traffic.order(["a", "b", "c"]) == ["b", "c", "a"]
        clock.jump(200)
        assert traffic.order(["a", "b", "c"]) == ["a", "b", "c"]

    trio.run(main, clock=clock)


async def test_all_that_does_not_come_to_its_end_has_failed() -> None:
    """An error, and being cancelled for a stall; a success makes up for them."""
    traffic = Traffic()
    with pytest.raises(OSError, match="gone"), traffic.attempt("a"):
        raise OSError("gone")
    with trio.CancelScope() as scope, traffic.attempt("b"):
        scope.cancel()
        await trio.sleep_forever()
    assert traffic.order(["a", "b", "c"]) == ["c", "a", "b"]
    with traffic.attempt("b"):
        await trio.lowlevel.checkpoint()
    assert traffic.order(["a", "b", "c"]) == ["b", "c", "a"]


def test_a_program_that_takes_too_long_is_ended() -> None:
    """It is killed, and its end says that no answer came; one in time is left alone."""
    sleep, true = (program.Program(line.split(), "coreutils") for line in ("sleep 600", "true"))
    assert program.run(sleep, limits=program.Limits(0.05)).status == errno.ETIMEDOUT
    assert program.run(true, limits=program.Limits(600)).status == 0
