"""Constraints of structured outputs are compiled in a process of their own before vLLM has them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import pytest
import xgrammar
from transformers import AutoTokenizer

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, Unsupported
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.engine import constraints
from steer_service.engine.config import engine_args_for
from steer_service.engine.constraints import CHILD, MEMORY_BYTES, ConstraintChecks
from steer_service.hf.bundled_model import ensure_bundled_model

pytestmark = pytest.mark.slow

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
}

SERVED = {
    "a schema": {"json": PERSON},
    "a regex": {"regex": r"[0-9]{4}-[0-9]{2}"},
    "a recursive grammar": {"grammar": 'root ::= t ("+" t)*\nt ::= [0-9]+ | "(" root ")"'},
    "choices": {"choice": ['say "yes"', "no\n", "日本"]},
}

WRONG = {
    "a regex": ({"regex": "("}, "regex"),
    "a grammar": ({"grammar": "root ::= ("}, "grammar"),
    "another grammar's syntax": ({"grammar": 'start: "a"'}, "grammar"),
    "a grammar without a root": ({"grammar": 'rule ::= "a"'}, "grammar"),
    "a type of a schema": ({"json": {"type": "nothing"}}, "json"),
    "a value in a schema": ({"json": {"type": "string", "format": ["date"]}}, "json"),
    "a deep expression": ({"regex": "(" * 2000 + "a" + ")" * 2000}, "regex"),
    "a reference": ({"json": {"$ref": "#/$defs/missing"}}, "json"),
    "a character that no token has": ({"regex": "ab\x04"}, "regex"),
}

DENSE = "root ::= r0 r1\n" + "\n".join(
    f'r{i} ::= r{(i * 7 + 1) % 60} r{(i * 11 + 3) % 60} r{(i * 5 + 2) % 60} | "a" | ""' for i in range(60)
)
"""A grammar that compiles at once, and whose second token takes seconds."""

HOSTILE = {
    "many states": ({"regex": ".{1,2000}x"}, "regex"),
    "a long list of long lists": (
        {"json": {"type": "array", "minItems": 5000, "items": {"type": "string", "maxLength": 5000}}},
        "json",
    ),
    "slow tokens": ({"grammar": DENSE}, "grammar"),
    "slow tokens after a text": ({"grammar": DENSE.replace("r0 r1", f'"{"q" * 300}" r0 r1', 1)}, "grammar"),
}


@pytest.fixture(scope="module")
def vocabulary() -> str:
    tokenizer = AutoTokenizer.from_pretrained(ensure_bundled_model())
    return str(xgrammar.TokenizerInfo.from_huggingface(tokenizer).serialize_json())


@pytest.fixture(scope="module")
def checks(vocabulary: str) -> Iterator[ConstraintChecks]:
    made = ConstraintChecks(lambda: vocabulary, cpu_s=1)
    asyncio.run(made.check(StructuredOutputs(choice=("start the process",))))
    yield made
    made.close()


async def refusal(checks: ConstraintChecks, constraint: dict[str, object]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        await checks.check(StructuredOutputs.of(constraint))
    return refused.value


@pytest.mark.parametrize("name", SERVED)
async def test_usual_constraints_are_served(checks: ConstraintChecks, name: str) -> None:
    await checks.check(StructuredOutputs.of(SERVED[name]))


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_constraint_is_refused_with_the_compilers_sentence(checks: ConstraintChecks, name: str) -> None:
    constraint, kind = WRONG[name]
    error = await refusal(checks, constraint)
    assert (error.reason, error.field) == ("BAD_CONSTRAINT", f"sampling.structured_outputs.{kind}")
    assert error.message
    assert "/project" not in error.message


async def test_a_schema_that_cannot_be_enforced_is_not_supported(checks: ConstraintChecks) -> None:
    schema = {"type": "object", "properties": {"size": {"type": "integer", "multipleOf": 3}}}
    with pytest.raises(Unsupported) as refused:
        await checks.check(StructuredOutputs.of({"json": schema}))
    assert refused.value.reason == "UNSUPPORTED_SCHEMA"


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_constraint_is_refused_and_the_next_is_served(checks: ConstraintChecks, name: str) -> None:
    constraint, kind = HOSTILE[name]
    error = await refusal(checks, constraint)
    assert (error.reason, error.field) == ("CONSTRAINT_TOO_COMPLEX", f"sampling.structured_outputs.{kind}")

    await checks.check(StructuredOutputs(choice=(f"after {name}",)))


async def test_a_constraint_that_takes_long_to_read_is_refused(
    vocabulary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "PARSE_S", -1.0)
    checks = ConstraintChecks(lambda: vocabulary, cpu_s=10)
    error = await refusal(checks, {"regex": "[ab]"})
    assert error.reason == "CONSTRAINT_TOO_COMPLEX"
    assert "of it to be read" in error.message
    checks.close()


async def test_running_requests_have_constraints_up_to_a_limit_of_memory(
    checks: ConstraintChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = StructuredOutputs(regex="[ab]{3}c"), StructuredOutputs(regex="[ab]{4}d")
    await checks.check(first)
    await checks.check(second)
    monkeypatch.setattr(constraints, "KEPT_BYTES", checks.compiled_bytes(first))
    with checks.kept(first):
        with checks.kept(first):
            pass
        with pytest.raises(Overloaded) as refused, checks.kept(second):
            pass
    assert refused.value.reason == "QUEUE_FULL"
    with checks.kept(StructuredOutputs(regex="[ab]{3}c")):
        pass


async def test_a_tokenizer_that_cannot_have_constraints_is_looked_at_once() -> None:
    looks = []

    def vocabulary() -> str:
        looks.append(1)
        raise Unsupported("no", reason="NO_STRUCTURED_OUTPUTS", field="sampling.structured_outputs")

    checks = ConstraintChecks(vocabulary, cpu_s=1)
    for text in ("a", "b"):
        with pytest.raises(Unsupported) as refused:
            await checks.check(StructuredOutputs(choice=(text,)))
        assert refused.value.reason == "NO_STRUCTURED_OUTPUTS"
    assert len(looks) == 1
    checks.close()


async def fork_of(child: psutil.Process) -> psutil.Process:
    """The process that compiles a constraint, as soon as there is one."""
    async with asyncio.timeout(60):
        while not (forks := child.children()):
            await asyncio.sleep(0)
    [fork] = forks
    return fork


async def test_closing_ends_the_compilation_that_runs(vocabulary: str) -> None:
    checks = ConstraintChecks(lambda: vocabulary, cpu_s=60)
    await checks.check(StructuredOutputs(choice=("start the process",)))
    checking = asyncio.ensure_future(checks.check(StructuredOutputs.of(HOSTILE["many states"][0])))
    child = psutil.Process(checks.child_pid)
    fork = await fork_of(child)

    checks.close()

    assert not child.is_running()
    psutil.wait_procs([fork], timeout=60)
    assert not fork.is_running()
    with pytest.raises(EngineFailed):
        await checking


async def test_the_compilation_that_runs_ends_with_the_server(vocabulary: str) -> None:
    asked = {"kind": "regex", "text": ".{1,2000}x", "cpu_s": 60, "wall_s": 600, "parse_s": 1, "step_s": 1}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", CHILD, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    for line in ({"vocabulary": vocabulary}, asked | {"memory_bytes": MEMORY_BYTES}):
        process.stdin.write(json.dumps(line).encode() + b"\n")
    await process.stdin.drain()
    fork = await fork_of(psutil.Process(process.pid))

    process.stdin.close()  # as the system does for a server that is killed

    await asyncio.wait_for(process.wait(), 60)
    psutil.wait_procs([fork], timeout=60)
    assert not fork.is_running()


async def test_a_compilation_that_the_system_ends_for_its_memory_is_refused(checks: ConstraintChecks) -> None:
    child = psutil.Process(checks.child_pid)
    checking = asyncio.ensure_future(refusal(checks, {"regex": ".{2,2000}z"}))
    async with asyncio.timeout(60):
        while not (forks := child.children()) or forks[0].rlimit(psutil.RLIMIT_AS)[0] == psutil.RLIM_INFINITY:
            await asyncio.sleep(0)
    least = child.memory_info().vms
    assert least < forks[0].rlimit(psutil.RLIMIT_AS)[0] <= least + 2 * MEMORY_BYTES
    forks[0].kill()

    error = await checking

    assert (error.reason, error.field) == ("CONSTRAINT_TOO_COMPLEX", "sampling.structured_outputs.regex")
    assert error.message == "the constraint is too complex: it needs more than 1024 MiB of memory"


def test_the_process_gets_no_signal_of_the_terminal_and_as_much_time_as_the_server(checks: ConstraintChecks) -> None:
    assert checks.child_pid is not None
    assert os.getpgid(checks.child_pid) == checks.child_pid
    assert os.getsid(checks.child_pid) == os.getsid(0)  # Linux shares processors among sessions


async def test_many_at_once_use_one_process_and_the_same_ones_are_compiled_once(checks: ConstraintChecks) -> None:
    assert checks.child_pid is not None
    me, child = psutil.Process(), psutil.Process(checks.child_pid)
    before = len(me.children())
    hostile = StructuredOutputs(regex=".{3,2000}y")

    outcomes = await asyncio.gather(*(checks.check(hostile) for _ in range(20)), return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {InvalidRequest}
    assert len({id(outcome) for outcome in outcomes}) == 20
    assert len(me.children()) == before
    assert child.is_running()
    assert child.children() == []


async def test_a_process_that_is_killed_fails_its_check_and_is_started_again(vocabulary: str) -> None:
    checks = ConstraintChecks(lambda: vocabulary, cpu_s=1)
    await checks.check(StructuredOutputs(choice=("first",)))
    assert checks.child_pid is not None
    stopped = checks.child_pid
    os.kill(stopped, signal.SIGSTOP)
    checking = asyncio.ensure_future(checks.check(StructuredOutputs(choice=("killed",))))
    await asyncio.sleep(0)
    os.kill(stopped, signal.SIGKILL)
    with pytest.raises(EngineFailed) as failed:
        await checking
    assert failed.value.reason == "CHECK_FAILED"

    await checks.check(StructuredOutputs(choice=("killed",)))

    assert checks.child_pid not in (None, stopped)
    checks.close()


async def test_a_check_that_runs_ends_when_the_engine_is_closed() -> None:
    checks = ConstraintChecks(lambda: json.dumps("never read"), cpu_s=1)
    checking = asyncio.ensure_future(checks.check(StructuredOutputs(choice=("a",))))
    while checks.child_pid is None:
        await asyncio.sleep(0.001)
    checks.close()
    with pytest.raises(EngineFailed) as failed:
        await checking
    assert failed.value.reason == "CLOSED"
    with pytest.raises(EngineFailed):
        await checks.check(StructuredOutputs(choice=("b",)))


@pytest.mark.parametrize("backend", ["auto", "xgrammar"])
def test_the_backend_of_structured_outputs_is_the_one_that_checks_them(backend: str) -> None:
    given = {"backend": backend, "reasoning_parser": "qwen3"}
    args = engine_args_for("a/model", {"structured_outputs_config": given})

    assert args.structured_outputs_config.backend == "xgrammar"
    assert args.structured_outputs_config.reasoning_parser == "qwen3"


def test_another_backend_of_structured_outputs_is_refused() -> None:
    with pytest.raises(Unsupported) as refused:
        engine_args_for("a/model", {"structured_outputs_config": {"backend": "guidance"}})
    assert refused.value.field == "structured_outputs_config"
