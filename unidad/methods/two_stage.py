"""The two-stage rival adapt-then-distill (the paper's FT-DMD2): fine-tune the source, then distil the result by DMD2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unidad.backbones.base import Backbone
from unidad.methods.objective import Objective
from unidad.methods.unidad import UniDAD


class AdaptThenDistill(UniDAD):
    """Stage 1 trains the target teacher alone on the target pictures; stage 2 is DMD2 with it, frozen, as the only teacher.

    At the change of stage the fake teacher, and the student unless it is distilled already, take the target teacher's weights; a
    distilled student takes its change of weights where `transfer` says so.

    Args:
        objective: `a` is taken as 1.
        adapt_cycles: length of stage 1.
        student_from_teacher: False leaves the student what it was given as.
        others: as for `UniDAD`.

    Raises:
        ValueError: if there is no stage 1, or no DMD in stage 2.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        target_teacher: Backbone | None,
        adapt_cycles: int,
        student_from_teacher: bool = True,
        **others: Any,
    ):
        if adapt_cycles < 1 or objective.dmd_weight <= 0:
            raise ValueError("adapt-then-distill needs adapt_cycles of at least 1 and a dmd_weight above 0")
        super().__init__(
            objective=replace(objective, a=1.0),
            target_teacher=target_teacher,
            source_teacher=None,
            train_target=True,
            target_warmup=adapt_cycles,
            target_cycles=adapt_cycles,
            **others,
        )
        self.adapt_cycles = adapt_cycles
        self._receivers = ("student", "fake_teacher") if student_from_teacher else ("fake_teacher",)

    def start_cycle(self, cycle: int) -> tuple[str, ...]:
        """At the first cycle of stage 2 the adapted weights are handed on."""
        self._fresh = []
        if cycle != self.adapt_cycles:
            return ()
        if self.transfer and "student" not in self._receivers:
            return super().start_cycle(cycle)
        for name in self._receivers:
            self.networks[name].load_state_dict(self.networks["target_teacher"].state_dict())
        return self._receivers
