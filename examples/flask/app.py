"""A chat on Flask: log in, ask, watch the answer come, reload, stop; the answer ends up in the database.

`python examples/run.py flask` runs it, with all that it needs.
"""

import hmac
import os
import secrets
import sqlite3
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from flask import Flask, abort, redirect, render_template, request, session, url_for

import deltawire
from deltawire.tokens import mint
from deltawire.webhooks import InvalidWebhookError, verify

DATABASE = os.environ.get("DATABASE", Path(__file__).parent / "chat.sqlite3")
USERS = {"ada": "lovelace", "grace": "hopper"}  # in place of a table of yours, with hashed passwords
SCHEMA = "CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, user, prompt, job_id, status, text)"

app = Flask(__name__)
app.secret_key = os.environ.get("SESSION_SECRET") or secrets.token_hex()
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"  # other sites' forms come without the cookie


def query(sql: str, *values: Any) -> list[sqlite3.Row]:
    """Runs one statement, in a transaction of its own."""
    connection = sqlite3.connect(DATABASE)
    connection.row_factory = sqlite3.Row
    try:
        with connection:
            return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


query(SCHEMA)


def login_required(view):
    @wraps(view)
    def guarded(*args, **kwargs):
        return view(*args, **kwargs) if "user" in session else redirect(url_for("log_in"), 303)

    return guarded


def own_answer(answer_id: int) -> sqlite3.Row:
    """404 for what is somebody else's, as for what there is not."""
    sql = "SELECT * FROM answers WHERE id = ? AND user = ? AND job_id != ''"
    rows = query(sql, answer_id, session["user"])
    return rows[0] if rows else abort(404)


@app.route("/login", methods=["GET", "POST"])
def log_in():
    if request.method == "GET":
        return render_template("login.html")
    user, password = request.form["username"], request.form["password"]
    if user not in USERS or not hmac.compare_digest(USERS[user].encode(), password.encode()):
        return render_template("login.html", is_wrong=True), 403
    session["user"] = user
    return redirect(url_for("home"), 303)


@app.get("/")
@login_required
def home():
    sql = "SELECT * FROM answers WHERE user = ? AND job_id != '' ORDER BY id DESC"
    return render_template("home.html", answers=query(sql, session["user"]))


# --- deltawire: begin ---------------------------------------------------------------------------------------

client = deltawire.Client()  # DELTAWIRE_PUBLIC_URL and DELTAWIRE_API_KEY say where


@app.post("/answers")
@login_required
def ask():
    """The row first: the job may have ended before this view goes on."""
    user, prompt = session["user"], request.form["prompt"]
    (row,) = query("INSERT INTO answers (user, prompt) VALUES (?, ?) RETURNING id", user, prompt)
    body = {"model": "gpt-5.4", "messages": [{"role": "user", "content": prompt}]}
    job = client.submit(body, {"metadata": {"answer": str(row["id"])}})
    query("UPDATE answers SET job_id = ? WHERE id = ?", job.id, row["id"])
    return redirect(url_for("show", answer_id=row["id"]), 303)


@app.get("/answers/<int:answer_id>")
@login_required
def show(answer_id: int):
    """What is there, or where it comes: an address that lets this user read this one job, for 15 minutes."""
    answer = own_answer(answer_id)
    secret, job_id = os.environ["DELTAWIRE_JWT_SECRET"], answer["job_id"]
    ticket = mint(secret, subject=session["user"], jobs=[job_id], ttl_s=900)
    events = f"{os.environ['DELTAWIRE_PUBLIC_URL']}/v1/jobs/{job_id}/events?mode=snapshot&ticket={ticket}"
    return render_template("answer.html", answer=answer, events=events)


@app.post("/answers/<int:answer_id>/stop")
@login_required
def stop(answer_id: int):
    client.cancel(own_answer(answer_id)["job_id"])
    return redirect(url_for("show", answer_id=answer_id), 303)


@app.post("/hooks/deltawire")
def job_has_ended():
    """Called at the end of each job, also of those that nobody watches; perhaps twice."""
    try:
        job = verify(os.environ["WEBHOOK_SECRET"], request.headers, request.get_data())["data"]
    except InvalidWebhookError:
        abort(401)
    if not job["completion"]:  # there is none, or it is too large for a message
        with suppress(deltawire.NotFoundError):  # the job was erased in the meantime
            job = client.retrieve(job["id"])
    text = (job["completion"]["choices"][0]["message"]["content"] or "") if job["completion"] else ""
    answer_id = job["metadata"].get("answer")
    query("UPDATE answers SET status = ?, text = ? WHERE id = ?", job["status"], text, answer_id)
    return "", 204


# --- deltawire: end -----------------------------------------------------------------------------------------
