"""Locust's shapes for the scenarios with stages. `--users`, `--spawn-rate` and `--run-time` hold for them too.

`locustfile` chooses one by the scenario; what the stages are is `scenarios`' business. Imported by Locust alone.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

from locust import LoadTestShape

from load.scenarios import SCENARIOS, Scenario


class StagedShape(LoadTestShape):
    """Users by the stages of a scenario, over the run time."""

    abstract = True
    use_common_options = True
    scenario: ClassVar[Scenario]

    def tick(self) -> tuple[int, float] | None:
        """Asked about once a second; None ends the run."""
        assert self.runner is not None
        options: Any = self.runner.environment.parsed_options
        passed_s = time.perf_counter() - self.start_time
        users = self.scenario.users_at(passed_s / options.run_time, options.num_users)
        return None if users is None else (users, options.spawn_rate)


class SpikeShape(StagedShape):
    """A tenth of the users, all of them at once, a tenth again."""

    scenario = SCENARIOS["spike"]


class StepShape(StagedShape):
    """A fifth more users with each fifth of the run time."""

    scenario = SCENARIOS["step"]


SHAPES: dict[str, type[StagedShape]] = {shape.scenario.name: shape for shape in (SpikeShape, StepShape)}
"""By scenario."""
