"""Which address is which view."""

from chat import views
from django.contrib.auth.views import LoginView
from django.urls import path

urlpatterns = [
    path("", views.home),
    path("login", LoginView.as_view(), name="login"),
    path("answers", views.ask),
    path("answers/<int:answer_id>", views.show, name="answer"),
    path("answers/<int:answer_id>/stop", views.stop),
    path("hooks/deltawire", views.job_has_ended),
]
