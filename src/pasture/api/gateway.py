"""What the routes of one app share. Built on first use, because an app may be up (and not ready) before its model is loaded."""

from __future__ import annotations

from functools import cached_property

from pasture.api.expecting import Expecting
from pasture.api.jobs import Jobs
from pasture.api.joining import Membership
from pasture.api.metrics import Metrics
from pasture.api.pinned import Pinned
from pasture.api.publics import Publics
from pasture.api.repairs import Repairs
from pasture.api.settings import ApiSettings
from pasture.core.asked import Asked
from pasture.core.ports import Clock, Service
from pasture.sessions.state import State
from pasture.sessions.values import Message, OpenSession
from pasture.text.prompts import Prompts
from pasture.web import Live


class Gateway:
    """The service, the state, the settings, and what is made from them."""

    def __init__(self, service: Service, state: State, settings: ApiSettings, clock: Clock) -> None:
        self.service = service
        self.state = state
        self.settings = settings
        self.clock = clock
        self.metrics = Metrics(service.statistics, clock)
        self.live = Live(service.statistics, lambda: self.model_name, clock, self.metrics.first_token, self.metrics.inter_token)
        self.members = Membership(state.sessions)
        self.asked = Asked()

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.service.vocabulary, self.settings.chat_template)

    @cached_property
    def publics(self) -> Publics:
        return Publics(self.service, self.state.public, self.prompts, self.clock)

    @cached_property
    def jobs(self) -> Jobs:
        return Jobs(self.service, self.prompts, self.settings, self.publics)

    @cached_property
    def pinned(self) -> Pinned:
        return Pinned(self.service, self.state, self.session_tokens)

    @cached_property
    def expecting(self) -> Expecting:
        settings = self.settings
        return Expecting(self.service, self.jobs, turn_ahead=settings.turn_ahead, prefetch=settings.prefetch)

    @cached_property
    def repairs(self) -> Repairs:
        return Repairs(self.service, self.state, self.jobs, self.publics, sessions=self.settings.turn_ahead)

    async def session_tokens(self, session: OpenSession, messages: list[Message]) -> tuple[int, ...]:
        """A session's conversation as the model reads it."""
        return await self.jobs.tokens(messages, session.context)  # type: ignore[arg-type]  # JSON, from the database

    @property
    def model_name(self) -> str:
        return self.settings.model_alias or self.service.model.name
