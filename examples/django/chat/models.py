"""What is asked, and answered."""

from django.conf import settings
from django.db import models


class Answer(models.Model):
    """`status` and `text` are empty until the job has ended."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    prompt = models.TextField()
    job_id = models.CharField(max_length=64, unique=True)
    status = models.CharField(max_length=16, blank=True)
    text = models.TextField(blank=True)
