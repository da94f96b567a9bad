"""A chat on FastAPI: log in, ask, watch the answer come, reload, stop; the answer ends up in the database.

`python examples/run.py fastapi` runs it, with all that it needs.
"""

import hmac
import os
import secrets
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.templating import Jinja2Templates
from starlette.middleware.sessions import SessionMiddleware

from deltawire import AsyncClient, NotFoundError
from deltawire.tokens import mint
from deltawire.webhooks import InvalidWebhookError, verify

HERE = Path(__file__).parent
DATABASE = os.environ.get("DATABASE", HERE / "chat.sqlite3")
USERS = {"ada": "lovelace", "grace": "hopper"}  # in place of a table of yours, with hashed passwords
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, user, prompt, job_id, status, text)"

templates = Jinja2Templates(HERE / "templates")


def query(sql: str, *values: Any) -> list[sqlite3.Row]:
    """Runs one statement, in a transaction of its own."""
    connection = sqlite3.connect(DATABASE)
    connection.row_factory = sqlite3.Row
    try:
        with connection:
            return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    query(SCHEMA)
    async with AsyncClient() as app.state.deltawire:  # DELTAWIRE_PUBLIC_URL and DELTAWIRE_API_KEY say where
        yield


app = FastAPI(lifespan=lifespan)
# SameSite=Lax: other sites' forms come without the cookie.
app.add_middleware(
    SessionMiddleware, secret_key=os.environ.get("SESSION_SECRET") or secrets.token_hex(), same_site="lax"
)


class LoginNeededError(Exception):
    """Nobody is logged in."""


@app.exception_handler(LoginNeededError)
async def go_and_log_in(_: Request, __: Exception) -> Response:
    return RedirectResponse("/login", 303)


def current_user(request: Request) -> str:
    if not (user := request.session.get("user")):
        raise LoginNeededError
    return str(user)


User = Annotated[str, Depends(current_user)]


async def form(request: Request) -> dict[str, str]:
    """The fields of a form. (FastAPI's own `Form` needs one more package.)"""
    return {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}


Form = Annotated[Mapping[str, str], Depends(form)]


def own_answer(answer_id: int, user: User) -> sqlite3.Row:
    """404 for what is somebody else's, as for what there is not."""
    rows = query("SELECT * FROM answers WHERE id = ? AND user = ? AND job_id != ''", answer_id, user)
    if not rows:
        raise HTTPException(404)
    return rows[0]


Answer = Annotated[sqlite3.Row, Depends(own_answer)]


@app.get("/login")
def login_page(request: Request) -> Response:
    return templates.TemplateResponse(request, "login.html")


@app.post("/login")
def log_in(request: Request, fields: Form) -> Response:
    user, password = fields.get("username", ""), fields.get("password", "")
    if user not in USERS or not hmac.compare_digest(USERS[user].encode(), password.encode()):
        return templates.TemplateResponse(request, "login.html", {"is_wrong": True}, 403)
    request.session["user"] = user
    return RedirectResponse("/", 303)


@app.get("/")
def home(request: Request, user: User) -> Response:
    answers = query("SELECT * FROM answers WHERE user = ? AND job_id != '' ORDER BY id DESC", user)
    return templates.TemplateResponse(request, "home.html", {"answers": answers})


# --- deltawire: begin ---------------------------------------------------------------------------------------


@app.post("/answers")
async def ask(request: Request, user: User, fields: Form) -> Response:
    """The row first: the job may have ended before this view goes on."""
    prompt = fields.get("prompt", "")
    (row,) = query("INSERT INTO answers (user, prompt) VALUES (?, ?) RETURNING id", user, prompt)
    body = {"model": "gpt-5.4", "messages": [{"role": "user", "content": prompt}]}
    job = await request.app.state.deltawire.submit(body, {"metadata": {"answer": str(row["id"])}})
    query("UPDATE answers SET job_id = ? WHERE id = ?", job.id, row["id"])
    return RedirectResponse(f"/answers/{row['id']}", 303)


@app.get("/answers/{answer_id}")
def show(request: Request, user: User, answer: Answer) -> Response:
    """What is there, or where it comes: an address that lets this user read this one job, for 15 minutes."""
    ticket = mint(os.environ["DELTAWIRE_JWT_SECRET"], subject=user, jobs=[answer["job_id"]], ttl_s=900)
    events = f"{os.environ['DELTAWIRE_PUBLIC_URL']}/v1/jobs/{answer['job_id']}/events"
    context = {"answer": answer, "events": f"{events}?mode=snapshot&ticket={ticket}"}
    return templates.TemplateResponse(request, "answer.html", context)


@app.post("/answers/{answer_id}/stop")
async def stop(request: Request, answer: Answer) -> Response:
    await request.app.state.deltawire.cancel(answer["job_id"])
    return RedirectResponse(f"/answers/{answer['id']}", 303)


@app.post("/hooks/deltawire")
async def job_has_ended(request: Request) -> Response:
    """Called at the end of each job, also of those that nobody watches; perhaps twice."""
    try:
        job = verify(os.environ["WEBHOOK_SECRET"], request.headers, await request.body())["data"]
    except InvalidWebhookError as error:
        raise HTTPException(401) from error
    if not job["completion"]:  # there is none, or it is too large for a message
        with suppress(NotFoundError):  # the job was erased in the meantime
            job = await request.app.state.deltawire.retrieve(job["id"])
    text = (job["completion"]["choices"][0]["message"]["content"] or "") if job["completion"] else ""
    answer_id = job["metadata"].get("answer")
    query("UPDATE answers SET status = ?, text = ? WHERE id = ?", job["status"], text, answer_id)
    return Response(status_code=204)


# --- deltawire: end -----------------------------------------------------------------------------------------
