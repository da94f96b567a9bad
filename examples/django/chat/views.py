"""A chat: ask, watch the answer come, reload, stop; the answer ends up in the database.

`python examples/run.py django` runs it, with all that it needs.
"""

import uuid
from contextlib import suppress

from celery import Celery
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

import deltawire
from deltawire.tokens import mint
from deltawire.webhooks import InvalidWebhookError, verify

from .models import Answer

celery = Celery(broker=settings.CELERY_BROKER_URL)  # the one that your project has already


@login_required
def home(request: HttpRequest) -> HttpResponse:
    answers = Answer.objects.filter(user=request.user).order_by("-id")
    return render(request, "home.html", {"answers": answers})


# --- deltawire: begin ---------------------------------------------------------------------------------------

client = deltawire.Client()  # DELTAWIRE_PUBLIC_URL and DELTAWIRE_API_KEY say where


@login_required
@require_POST
def ask(request: HttpRequest) -> HttpResponse:
    """The row first: the job may have ended before this view goes on. A task's id is its job's."""
    job_id, prompt = uuid.uuid4().hex, request.POST["prompt"]
    answer = Answer.objects.create(user=request.user, prompt=prompt, job_id=job_id)
    body = {"model": "gpt-5.4", "messages": [{"role": "user", "content": prompt}]}
    celery.send_task("deltawire.generate", kwargs={"request": body}, queue="deltawire", task_id=job_id)
    return redirect("answer", answer.id)


@login_required
def show(request: HttpRequest, answer_id: int) -> HttpResponse:
    """What is there, or where it comes: an address that lets this user read this one job, for 15 minutes."""
    answer = get_object_or_404(Answer, id=answer_id, user=request.user)
    user, secret = str(request.user.pk), settings.DELTAWIRE_JWT_SECRET
    ticket = mint(secret, subject=user, jobs=[answer.job_id], ttl_s=900)
    events = f"{settings.DELTAWIRE_URL}/v1/jobs/{answer.job_id}/events?mode=snapshot&ticket={ticket}"
    return render(request, "answer.html", {"answer": answer, "events": events})


@login_required
@require_POST
def stop(request: HttpRequest, answer_id: int) -> HttpResponse:
    client.cancel(get_object_or_404(Answer, id=answer_id, user=request.user).job_id)
    return redirect("answer", answer_id)


@csrf_exempt
@require_POST
def job_has_ended(request: HttpRequest) -> HttpResponse:
    """Called at the end of each job, also of those that nobody watches; perhaps twice."""
    try:
        job = verify(settings.WEBHOOK_SECRET, request.headers, request.body)["data"]
    except InvalidWebhookError:
        return HttpResponse(status=401)
    if not job["completion"]:  # there is none, or it is too large for a message
        with suppress(deltawire.NotFoundError):  # the job was erased in the meantime
            job = client.retrieve(job["id"])
    text = (job["completion"]["choices"][0]["message"]["content"] or "") if job["completion"] else ""
    Answer.objects.filter(job_id=job["id"]).update(status=job["status"], text=text)
    return HttpResponse(status=204)


# --- deltawire: end -----------------------------------------------------------------------------------------
