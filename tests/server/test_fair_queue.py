"""Places before the engine: who waits, who is next, and who is refused."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import Overloaded
from steer_service.server.fair_queue import OTHERS_S, FairQueue, Load
from tests.server.served import bounded


@pytest.fixture(autouse=True)
async def users_leave() -> AsyncIterator[None]:
    yield
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "user"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Users:
    """Tasks that take places and keep them until they are told to leave."""

    def __init__(
        self, places: int = 1, most: int = 100, most_of_client: int = 0, common: int | None = None, **load: int
    ) -> None:
        limits = {"bytes": 1000, "tokens": 1000, **load}
        self.now_s = 0.0
        self.queue = FairQueue(
            most=Load(requests=0, **limits),
            most_of_client=lambda _: most_of_client,
            retry_after_s=0.5,
            clock=lambda: self.now_s,
        )
        self.queue.open(places, most, common)
        self.served: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._leaving: dict[str, asyncio.Event] = {}

    async def come(self, name: str, share: str | None = None, **load: int) -> "asyncio.Task[None]":
        self._leaving[name] = asyncio.Event()
        task = asyncio.create_task(self._use(name, share or name[0], Load(**load)), name="user")
        self.tasks.append(task)
        await turns()
        return task

    async def _use(self, name: str, share: str, load: Load) -> None:
        async with self.queue.place(share, load):
            self.served.append(name)
            await self._leaving[name].wait()

    async def leave(self, *names: str) -> None:
        for name in names:
            self._leaving[name].set()
            await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(task: "asyncio.Task[None]") -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        await bounded(task)
    return caught.value


async def test_the_next_place_goes_to_the_client_with_the_fewest_running() -> None:
    users = Users(places=2)
    for name in ("a1", "a2", "a3", "a4", "b1", "c1"):
        await users.come(name)
    await users.leave("a1")
    assert users.served == ["a1", "a2", "b1"]
    await users.leave("a2", "b1")
    assert users.served == ["a1", "a2", "b1", "c1", "a3"]


async def test_a_client_with_more_running_waits_although_it_is_its_turn() -> None:
    users = Users(places=3)
    for name in ("a1", "a2", "b1", "a3", "b2"):
        await users.come(name)
    await users.leave("b1")
    assert users.served == ["a1", "a2", "b1", "b2"]


async def test_clients_with_as_many_running_take_turns() -> None:
    users = Users()
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        await users.come(name)
    await users.leave("a1", "b1", "c1", "a2", "b2")
    assert users.served == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_a_full_queue_refuses_the_client_that_fills_it_and_nobody_else() -> None:
    users = Users(places=1, most=4)
    tasks = [await users.come(name) for name in ("a1", "a2", "a3", "a4")]
    error = await refusal(await users.come("a5"))
    assert (error.reason, error.retry_after_s) == ("QUEUE_FULL", 0.5)

    await users.come("b1")

    assert (await refusal(tasks[3])).reason == "QUEUE_FULL"  # the newest of the one that has most
    await users.leave("a1")
    assert users.served == ["a1", "b1"]


@pytest.mark.parametrize("limits", [{}, {"most_of_client": 2}, {"places": 3, "common": 1}])
async def test_what_would_be_refused_is_known_before_it_comes(limits: dict[str, int]) -> None:
    users = Users(**{"places": 2, "most": 5, **limits})
    for name in ("a1", "b1", "a2", "a3", "c1", "b2", "a4", "b3", "c2", "d1", "d2", "c3"):
        share = name[0]
        expected = None
        try:
            users.queue.check_room(share)
        except Overloaded as error:
            expected = str(error)
        task = await users.come(name)
        assert (str(task.exception()) if task.done() else None) == expected
    assert any(task.done() for task in users.tasks)
    for task in users.tasks:
        task.cancel()
    await asyncio.wait(users.tasks)


async def test_a_client_that_runs_nothing_finds_a_place_although_another_could_take_all() -> None:
    users = Users(places=4, common=2)
    for name in ("b1", "a1", "a2", "a3"):
        await users.come(name)
    assert users.served == ["b1", "a1"]  # a2 and a3 wait: b, who was here, may come back
    await users.leave("b1")
    await users.come("a4")
    assert users.served == ["b1", "a1", "a2"]

    await users.come("b2")
    await users.come("c1")

    assert users.served == ["b1", "a1", "a2", "b2", "c1"]
    await users.leave("a1", "b2")
    assert users.served[5:] == []  # a2 and c1 are as many as clients that run something may have
    await users.leave("c1")
    assert users.served[5:] == ["a3"]


async def test_a_client_that_is_alone_takes_all_places() -> None:
    users = Users(places=4, common=2)
    for name in ("a1", "a2", "a3", "a4", "a5"):
        await users.come(name)
    assert users.served == ["a1", "a2", "a3", "a4"]


async def test_places_are_kept_for_another_client_only_a_while() -> None:
    users = Users(places=4, common=2)
    await users.come("b1")
    await users.leave("b1")
    for name in ("a1", "a2", "a3"):
        await users.come(name)
    assert users.served == ["b1", "a1", "a2"]
    users.now_s += OTHERS_S + 1
    await users.come("a4")
    assert set(users.served) == {"b1", "a1", "a2", "a3", "a4"}


@pytest.mark.parametrize("unit", ["bytes", "tokens"])
async def test_waiting_requests_are_limited_by_what_they_weigh(unit: str) -> None:
    users = Users(**{unit: 10})
    await users.come("a1", **{unit: 10_000})  # runs at once, and weighs nothing
    await users.come("a2", **{unit: 6})
    assert unit.rstrip("s") in str(await refusal(await users.come("a3", **{unit: 5})))
    await users.come("a4", **{unit: 4})
    await users.leave("a1", "a2")
    assert users.served == ["a1", "a2", "a4"]


async def test_a_client_has_a_limit_of_its_own() -> None:
    users = Users(places=1, most_of_client=2)
    await users.come("a1")
    await users.come("a2")
    assert (await refusal(await users.come("a3"))).reason == "CLIENT_QUOTA"
    await users.come("b1")
    await users.leave("a1", "b1")
    assert users.served == ["a1", "b1", "a2"]
    await users.come("a4")


async def test_who_is_cancelled_leaves_the_queue_or_hands_on_its_place() -> None:
    users = Users()
    tasks = {name: await users.come(name) for name in ("a1", "a2", "a3", "a4")}
    tasks["a2"].cancel()
    await turns()
    assert users.queue.waiting == 2

    users._leaving["a1"].set()
    while users.queue.waiting == 2:  # a3 has its place, but its task has not run yet
        await asyncio.sleep(0)
    tasks["a3"].cancel()
    await turns()

    assert users.served == ["a1", "a4"]
    await users.leave("a4")
    await bounded(users.queue.wait_idle())


@pytest.mark.parametrize(("places", "common"), [(2, None), (3, 1)])
@given(actions=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["come", "leave", "cancel"])), max_size=40))
def test_places_are_never_lost_or_given_twice(places: int, common: int | None, actions: list[tuple[str, str]]) -> None:
    async def run() -> None:
        users = Users(places=places, most=6, most_of_client=4, common=common)
        for number, (share, action) in enumerate(actions):
            mine = [task for task in users.tasks if not task.done()]
            if action == "come":
                await users.come(f"{share}{number}")
            elif action == "cancel" and mine:
                mine[number % len(mine)].cancel()
            elif mine:
                users._leaving[users.served[-1] if users.served else next(iter(users._leaving))].set()
            assert users.queue.running <= places
            assert users.queue.running + users.queue.waiting <= 6
        for task in users.tasks:
            task.cancel()
        await asyncio.gather(*users.tasks, return_exceptions=True)
        await bounded(users.queue.wait_idle())
        assert (users.queue.running, users.queue.waiting, users.queue._clients) == (0, 0, {})

    asyncio.run(run())
